"""How often Python's garbage collector looks at the server's objects."""

from __future__ import annotations

import gc

_YOUNG, _MIDDLE, _OLD = 10_000, 20, 20


def settle() -> None:
    """To be called once all parts are built: what they consist of is not looked at again, and what is new less often.

    A batch of ingest makes tens of thousands of objects that live for milliseconds and are in no cycle. With Python's own thresholds
    (700 objects, and all old ones now and then) a seventh of its CPU time went into looking at them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
