"""Runs an agent whose courier is the stand-in and whose broker speaks plain MQTT on loopback; all else is the product.

With a file ``unruly`` in the world's folder its workers are the product's as well, in a program that leaks or spins (``unruly_worker``).
With a file ``hold.json`` its updates are held in a state (``held``).
With a file ``clocks`` it and its workers have the clocks that this says (``skewed``).
"""

import os
import sys
from pathlib import Path

from skerry_agent import config, logs, supervisor
from skerry_agent.logring import LogRing
from skerry_agent.workers import WORKER

import held  # isort: skip
from skewed import install  # isort: skip

world = Path(os.environ["SKERRY_TEST_WORLD"])
unruly, clocks = world / "unruly", world / "clocks"
worker = WORKER
if clocks.exists():
    install(clocks)
    worker = (sys.executable, str(Path(__file__).with_name("skewed.py")), str(clocks))
if unruly.exists():
    worker = (sys.executable, str(Path(__file__).with_name("unruly_worker.py")), str(unruly))
hold = world / "hold.json"
if hold.exists():
    held.install(hold)
    worker = (sys.executable, str(Path(__file__).with_name("held.py")), str(hold))
found = config.load(Path(sys.argv[1]), os.environ)
ring = LogRing(found.log_file)
logs.configure(as_json=False, level="debug", ring=ring)
courier = (sys.executable, str(Path(__file__).with_name("stand_in_courier.py")))
choices = {"plain_mqtt": True, "config_path": Path(sys.argv[1]), "ring": ring}
status = supervisor.run(found, os.environ, courier_command=courier, worker_command=worker, **choices)
ring.flush()
sys.exit(status)
