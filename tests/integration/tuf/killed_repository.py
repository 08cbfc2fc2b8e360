"""A server's repository that ends at one of its writes. Arguments: its folder, the online key, how many writes before, what it does, files."""

import datetime as dt
import itertools
import os
import sys
from pathlib import Path

from skerry_server.metadata import load_online_signer
from skerry_server.repository import Repository

folder, key, at, operation, *more = sys.argv[1:]
repository = Repository(Path(folder), load_online_signer(Path(key)), lambda: dt.datetime.now(dt.UTC))
at, earlier = int(at), itertools.count()


def hook(event, args):
    writes = event in ("os.rename", "os.remove", "os.mkdir") or (
        event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    )
    if writes:
        if next(earlier) >= at:
            os._exit(9)


sys.addaudithook(hook)
if operation == "group":
    repository.publish_group("line-1", Path(more[0]).read_bytes())
else:
    manifest = Path(more[2]).read_bytes()
    repository.install_catalog(Path(more[0]).read_bytes(), Path(more[1]).read_bytes(), lambda _: manifest)
