"""``skerry-server init | run | migrate | new-online-key``: makes, runs and upgrades the server that lives in one folder.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from skerry_server import __version__
from skerry_server.errors import BadSettings

OK, FAILED, USAGE = 0, 1, 2


class _JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="skerry-server", description="The fleet server of Skerry.")
    top.add_argument("--version", action="version", version=f"skerry-server {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    told = {
        "init": "make the folder: CA, online key, database, admin token",
        "run": "run everything in this process, with the broker as a child unless another is configured",
        "migrate": "bring the database to this release's schema",
        "new-online-key": "make one more online key, for a root that is to replace the present one",
        "broker-certificate": "make certificate and key of a broker that is not this server's child",
    }
    for name, text in told.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--data", type=Path, required=True, help="the folder that holds everything the server keeps"
        )
        command.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
        command.add_argument("--log-json", action="store_true", help="one JSON object per line")
        if name == "broker-certificate":
            command.add_argument("--out", type=Path, required=True, help="folder for ca.pem, broker.pem and broker.key")
            command.add_argument(
                "--name", action="append", required=True, help="host name or address of the broker; may come again"
            )
        if name in ("init", "run"):
            command.add_argument("--host", help="address to listen on")
            command.add_argument("--public-host", help="name or address under which devices reach the server")
        if name == "init":
            command.add_argument(
                "--online-key", metavar="URI", help="where the online key lies, e.g. hsm:2?label=fleet"
            )
        if name == "new-online-key":
            command.add_argument("--uri", help="where it lies, e.g. hsm:2?label=fleet; a file is made when left out")
        if name == "run":
            command.add_argument("--port", type=int, help="HTTPS port; 0: as last time, else a free one")
            command.add_argument("--mqtt-port", type=int, help="MQTT port; 0: as last time, else a free one")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    asked = parser().parse_args(arguments)
    _log_to_stderr(asked.log_level, asked.log_json)
    # The imports are heavy: `--help` and wrong usage answer without them, and only `run` needs the application.
    from skerry_server import config, folder
    from skerry_server.db.engine import open_engine
    from skerry_server.db.migrations import NEWEST, NewerDatabase, migrate

    overrides = {
        ("server", "host"): getattr(asked, "host", None),
        ("server", "public_host"): getattr(asked, "public_host", None),
        ("server", "port"): getattr(asked, "port", None),
        ("mqtt", "port"): getattr(asked, "mqtt_port", None),
    }
    try:
        settings = config.load(asked.data, os.environ, overrides)
        if asked.command == "init":
            _say(folder.initialise(settings, asked.online_key))
        elif asked.command == "broker-certificate":
            _say(folder.issue_broker_certificate(settings, asked.out, asked.name))
        elif asked.command == "new-online-key":
            _say(folder.new_online_key(settings, asked.uri))
        elif asked.command == "migrate":
            folder.require_initialised(settings.data)
            engine = open_engine(settings.database_url)
            found = migrate(engine)
            engine.dispose()
            _say({"from": found, "to": NEWEST})
        else:
            _end_on_signals()
            from skerry_server import app

            app.Server(settings).run()
    except BadSettings as error:
        sys.stderr.write("\n  ".join(["the configuration cannot be used:", *error.faults]) + "\n")
        return USAGE
    except (folder.NotInitialised, folder.AlreadyRunning, NewerDatabase, OSError, ValueError) as error:
        sys.stderr.write(f"skerry-server: {error}\n")
        return FAILED
    return OK


def _say(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _end_on_signals() -> None:
    """Makes the first SIGTERM or SIGINT end the program in order; more of them change nothing.

    While uvicorn serves it has handlers of its own, ends on a signal and raises it again afterwards; this one then meets it.
    """
    told = False

    def end(_number: int, _frame: object) -> None:
        nonlocal told
        if not told:
            told = True
            raise SystemExit(OK)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def _log_to_stderr(level: str, as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s level=%(levelname)s logger=%(name)s %(message)s")
    handler.setFormatter(_JsonLines() if as_json else plain)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))


if __name__ == "__main__":
    sys.exit(main())
