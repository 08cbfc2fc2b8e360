"""How the commands talk: exit codes, the configuration, how a running agent is asked, and how typed values are read."""

# ruff: noqa: T201 - what a command prints is its result.

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry_agent.asking import PATIENCE_S, Answer, ask, control_socket
from skerry_agent.errors import AgentError

if TYPE_CHECKING:
    from skerry_agent.config import Config

OK, FAILED, USAGE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130
DEFAULT_CONFIG = "/etc/skerry/agent.toml"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_config(parser: argparse.ArgumentParser) -> None:
    """Which configuration file."""
    known = Path(os.environ.get("SKERRY_AGENT_CONFIG", DEFAULT_CONFIG))
    parser.add_argument("--config", type=Path, default=known, metavar="FILE")


def read_config(options: argparse.Namespace) -> Config:
    """The whole configuration, each key checked. Raises ``BadConfig``."""
    # Checks every key, which takes longer than to ask an agent that runs.
    from skerry_agent.config import load

    return load(options.config, os.environ)


def asked(options: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
    """What the agent of this configuration answers. Raises ``AgentError``: ``not_running``, ``agent_silent``."""
    found = control_socket(options.config, os.environ)
    if found is not None:
        try:
            return ask(found, method, path, body)
        except TimeoutError:
            raise _silent(found) from None
        except OSError:
            # A full reading may know another place.
            pass
    config = read_config(options)
    try:
        return ask(config.run_dir / "control.sock", method, path, body)
    except TimeoutError:
        raise _silent(config.run_dir / "control.sock") from None
    except OSError as error:
        raise AgentError(
            "not_running",
            f"no agent answers in {config.run_dir}: {error}",
            advice="run: skerry-agent run --config FILE",
        ) from None


def _silent(path: Path) -> AgentError:
    return AgentError(
        "agent_silent",
        f"the agent behind {path} runs, and does not answer within {PATIENCE_S:g} s",
        advice="restart it: systemctl restart skerry-agent; its log says what it did last",
    )


def ordered(options: argparse.Namespace, path: str, body: dict[str, Any], words: str) -> int:
    """Gives an order, and says with ``words`` (a format over the answer) that it was taken. Returns the exit code."""
    answer = asked(options, "POST", path, body)
    if options.json:
        print(json.dumps(answer.body))
    elif answer.status == 200:
        print(words.format(**answer.body))
    else:
        print(f"skerry-agent: {answer.body['error']}", file=sys.stderr)
    if answer.status == 409:
        return REFUSED
    if answer.status == 400:
        return USAGE
    return OK if answer.status == 200 else FAILED


def duration(text: str) -> float:
    """Seconds of a typed time, e.g. ``10m``."""
    found = math.nan
    with contextlib.suppress(ValueError, KeyError):
        found = float(text[:-1]) * _UNITS[text[-1:]]
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a time as 30s, 10m, 2h or 1d, got {text!r}")
    return found


def rate(text: str) -> float:
    """A typed rate above 0."""
    found = math.nan
    with contextlib.suppress(ValueError):
        found = float(text)
    if found == 0:
        raise argparse.ArgumentTypeError("0 is no bound: --off lifts the throttle, and to serve nothing stop the agent")
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a number of inferences per second above 0, got {text!r}")
    return found


def count(text: str) -> int:
    """A typed number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 1, got {text!r}")
    return int(text)


def throttle_words(throttle: dict[str, Any] | None) -> str:
    """A throttle as a person reads it."""
    if throttle is None:
        return "off"
    left_s = throttle["left_s"]
    return f"{throttle['rate']:g} inferences/s, {'until --off' if left_s is None else f'for {left_s:.0f} s more'}"
