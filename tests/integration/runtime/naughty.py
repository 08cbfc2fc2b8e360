"""Copied into a folder of its own and run by ``child.run_module``: a child that does what no child should."""

import ctypes
import json
import os
import subprocess
import sys
import time

from skerry_runtime import child

verb, *rest = sys.argv[1:]
if verb in ("spawn-and-hang", "spawn-and-leave"):
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(rest[0], "w") as file:
        file.write(str(started.pid))
    if verb == "spawn-and-hang":
        time.sleep(600)
elif verb == "talk":
    while True:
        os.write(1, b"x" * 65536)
elif verb == "talk-stderr":
    while True:
        os.write(2, b"x" * 65536)
elif verb == "look":
    found = [fd for fd in range(3, 256) if os.path.exists(f"/proc/self/fd/{fd}")]
    print(json.dumps({"descriptors": [0, 1, 2, *found], "environment": sorted(os.environ), "cwd": os.getcwd()}))
else:
    child.limit_self(memory_mb=1000, timeout_s=0.2)
    if verb == "spin":
        while True:
            pass
    elif verb == "sleep":
        time.sleep(600)
    elif verb == "segfault":
        ctypes.string_at(0)
    elif verb == "write":
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "written"), "w") as file:
            file.write("x")
