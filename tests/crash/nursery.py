"""Starts agents by forking: a fresh interpreter for each would take most of the time.

Reads lines of JSON. ``{"config", "log", "boot_id", "real"}`` starts an agent on a configuration, with its output in a file and, unless empty,
another boot id than the machine's; ``real`` for the product's workers and couriers, else a stand-in and a network that is away. Answers with
the process id. ``{"end": pid}`` kills it, waits for it, and answers with 0.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from skerry_agent import channel, clock, logs, supervisor
from skerry_agent import config as configuration
from skerry_agent import workerwire as ww
from skerry_agent.errand import COURIER
from skerry_agent.errors import AgentError
from skerry_agent.logring import LogRing
from skerry_agent.workers import WORKER

STAND_IN = Path(__file__).with_name("stand_in_worker.py")
MESSAGES = tuple(channel._encoder.encode(found).hex() for found in (ww.Ready(pid=0x7FFFFFFF, models=()), ww.Drained()))


def live(asked: dict[str, Any]) -> int:
    """An agent's life in this process."""
    os.setsid()
    # It must not outlive a test that is broken off: PR_SET_PDEATHSIG of prctl(2).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    if asked["boot_id"]:
        clock._boot_id = lambda: asked["boot_id"]
    config = configuration.load(Path(asked["config"]), {})
    ring = LogRing(config.log_file)
    logs.configure(as_json=False, level="info", ring=ring)
    worker = (sys.executable, "-I", "-S", str(STAND_IN), *MESSAGES)
    # What is encrypted is opened, as it is without a network.
    courier = ("/bin/sh", "-c", 'test "$1" = unseal && exec "$0" -P -m skerry_agent.courier unseal', sys.executable)
    if asked["real"]:
        worker, courier = WORKER, COURIER
    try:
        return supervisor.run(config, os.environ, worker_command=worker, courier_command=courier, ring=ring)
    except AgentError as error:
        print(f"agent refused to start: {error.code}: {error.detail}", flush=True)
        return 1


def main() -> None:
    """Reads until its input ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        if "end" in asked:
            os.kill(asked["end"], signal.SIGKILL)
            os.waitpid(asked["end"], 0)
            print(0, flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(live(asked))
        print(pid, flush=True)


main()
