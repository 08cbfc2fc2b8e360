"""Leaves OpenSSL out of a process that answers on this device and speaks no TLS: of a worker it would be 5.6 MB.

asyncio, uvloop and hashlib load it at import, whether it is used or not. asyncio and hashlib do without where it cannot be had. uvloop
takes some names out of ``ssl`` at its own import and looks at them again only for a TLS connection: it gets placeholders. When they are
imported ``ssl`` is as ever: who needs it later (``spans`` to an address with https) imports the real one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

_OWN_HASHES = (("_blake2",), ("_sha256", "_sha2"))
"""Modules with Python's own hashes, which some distributions build without: one of each must be there."""


class _NoTls(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0 if name.isupper() else type(name, (Exception,), {})


def import_event_loops(*, uvloop: bool) -> None:
    """Imports asyncio, hashlib and, with ``uvloop``, that too where it is installed, without OpenSSL. Call before anything else does."""
    if not sys.modules.keys().isdisjoint(("asyncio", "hashlib", "ssl", "_hashlib")):
        return
    absent = ["ssl"]
    if all(any(importlib.util.find_spec(name) for name in names) for names in _OWN_HASHES):
        absent.append("_hashlib")
    with _instead(dict.fromkeys(absent)):
        import asyncio  # noqa: F401
        import hashlib  # noqa: F401
        import hmac  # noqa: F401
    if not uvloop:
        return
    with _instead({"ssl": _NoTls("ssl")}):
        try:
            importlib.import_module("uvloop")
        except Exception:
            # Not installed, or a release that wants more of it: who imports it next, without this, sees.
            for name in [name for name in sys.modules if name.partition(".")[0] == "uvloop"]:
                del sys.modules[name]


@contextmanager
def _instead(modules: dict[str, types.ModuleType | None]) -> Iterator[None]:
    # None there makes an import fail as if the module were not installed.
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
