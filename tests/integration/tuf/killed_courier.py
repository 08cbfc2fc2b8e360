"""A courier that ends at one of its writes to disk. Arguments: how many it may do before, the verb, the folder whose writes count."""

import itertools
import os
import runpy
import sys

at, verb, inside = int(sys.argv[1]), sys.argv[2], sys.argv[3]
earlier = itertools.count()


def hook(event, args):
    if event not in ("os.rename", "os.remove", "os.mkdir", "os.symlink", "open"):
        return
    path = os.fsdecode(args[1] if event == "os.symlink" else args[0]) if not isinstance(args[0], int) else ""
    if not path.startswith(inside):
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    if next(earlier) >= at:
        os._exit(9)


sys.argv = ["courier", verb]
sys.addaudithook(hook)
runpy.run_module("skerry_agent.courier", run_name="__main__")
