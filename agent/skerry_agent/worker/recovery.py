"""What a dead worker left in its ring: folded once, by whoever comes after it, and nothing in it believed beyond what a recorder writes.

The label book beside the ring takes in what was answered and not yet read, before the ring goes.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from skerry_contract import wire

from skerry_agent import workerwire as ww
from skerry_agent.worker import book as b
from skerry_agent.worker import mapped
from skerry_agent.worker import ring as r
from skerry_agent.worker.choosing import Choice
from skerry_agent.worker.fold import CHUNK, Fold

log = logging.getLogger(__name__)


def recover(message: ww.Recover, *, boot_id: str) -> tuple[ww.WindowCut | None, ww.Recovered]:
    """Folds what a dead worker left: its window, if any, and what to say about the ring.

    A record counts when its slots were published, which happens before its reply is sent. The ring was mapped writable into
    a process that ran foreign native code: nothing in it is believed beyond what a recorder can have written.
    """
    try:
        ring = r.Ring.open(message.ring, boot_id=boot_id)
        try:
            return _folded(ring, message, boot_id)
        finally:
            ring.close()
    except Exception as error:
        detail = str(error) if isinstance(error, mapped.Damaged) else f"{type(error).__name__}: {error}"
        log.warning("ring not recovered path=%s error=%s", message.ring, detail)
        inferences = r.most_in(message.ring, message.start, r.CAPACITY)
        return None, ww.Recovered(ring=message.ring, upto=message.start, damage=detail, inferences=inferences)


def _folded(ring: r.Ring, message: ww.Recover, boot_id: str) -> tuple[ww.WindowCut | None, ww.Recovered]:
    upto = ring.written
    if not message.start <= upto <= message.start + r.MOST_UNCOMMITTED:
        raise mapped.Damaged(f"written up to {upto}, committed up to {message.start}")
    lost = max(0, upto - ring.capacity - message.start)
    slots, whole = ring.span(message.start + lost, upto)
    damaged = len(slots) - int(np.count_nonzero(whole))
    if damaged and lost:
        raise mapped.Damaged(f"{damaged} of the last {len(slots)} slots are not of their positions")
    _fill_book(ring, boot_id)
    # Nobody can explain what a dead worker answered: what was chosen of it counts as dropped.
    fold = Fold(ring.header.plan, Choice(ring.header.plan, ring.header.seed))
    kept, places = slots[whole], np.arange(message.start + lost, upto)[whole]
    for low in range(0, len(kept), CHUNK):
        part = kept[low : low + CHUNK]
        fold.add(ring.meta[part], ring.values[part], places[low : low + CHUNK])
    cut = None
    if fold.slots:
        first, last = fold.span_ns
        window = fold.window(ring.header.key, ring.instant(first), ring.instant(last), {})
        cut = ww.WindowCut(
            ring=message.ring, start=message.start, upto=upto, body=wire.encode(window), inferences=fold.ok
        )
    damage = f"{damaged} of {len(slots)} slots are not of their positions" if damaged else ""
    return cut, ww.Recovered(ring=message.ring, upto=upto, lost=lost, damage=damage, inferences=damaged)


def _fill_book(ring: r.Ring, boot_id: str) -> None:
    """Takes what a dead worker had answered and not yet folded into its book, before the ring goes."""
    path = b.path_beside(ring.path)
    if not Path(path).exists():
        return
    try:
        book = b.Book.open(path, boot_id=boot_id)
    except mapped.Locked:
        # Its worker lives, and had filled it before it gave up the ring.
        return
    except mapped.Damaged as error:
        # Whoever takes the book over says so.
        log.warning("label book not filled path=%s error=%s", path, error)
        return
    try:
        book.fill(ring, ring.written, believe=False)
    except Exception:
        # The inferences count all the same.
        log.exception("label book not filled path=%s", path)
    finally:
        book.close()
