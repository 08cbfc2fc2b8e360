"""Runs an agent whose courier is the stand-in and whose broker speaks plain MQTT on loopback; all else is the product."""

import os
import sys
from pathlib import Path

from skerry_agent import config, logs, supervisor

found = config.load(Path(sys.argv[1]), os.environ)
logs.configure(as_json=False, level="debug")
courier = (sys.executable, str(Path(__file__).with_name("stand_in_courier.py")))
sys.exit(supervisor.run(found, os.environ, courier_command=courier, plain_mqtt=True))
