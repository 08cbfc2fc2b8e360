"""What a worker says, and who is to know: its generation, the rings and the store, whoever passes connections on."""

from __future__ import annotations

import os
from typing import Any

from skerry_agent import workerwire as ww
from skerry_agent.core import liveness
from skerry_agent.errors import Rejected
from skerry_agent.serving.generation import Generation, take_health
from skerry_agent.serving.site import Site


def hear(site: Site, generation: Generation, message: Any, fd: int | None, *, serves: bool) -> None:
    """Does what a message of a generation's worker asks for. Owns ``fd``. ``serves``: it is the one that its cell serves by."""
    rings = site.rings
    match message:
        case ww.Loading(model=model):
            generation.loading = model
        case ww.Ready():
            if not generation.ready.done():
                _note_memory(site, generation, message)
                generation.loading = ""
                generation.ready.set_result(message)
        case ww.Failed():
            if not generation.ready.done():
                detail = f"{message.model}: {message.detail}"
                generation.ready.set_exception(Rejected(message.code, detail, model=message.model))
        case ww.WindowCut():
            rings.commit(generation.worker, message)
        case ww.Sampled():
            rings.sampled(message)
        case ww.Health():
            take_health(generation, message, site.clock.boot_s())
            if serves:
                site.on_health(generation)
        case ww.Conn() if fd is not None:
            site.on_connection(generation, message, fd)
            fd = None
        case ww.Conn():
            rings.count_lost("connections_cut", 1)
        case ww.Took(id=number):
            site.on_took(number)
        case ww.Cut(connections=connections):
            rings.count_lost("connections_cut", connections)
        case ww.Rekeyed():
            generation.former.discard(message.ring)
            rings.remove(message.ring)
        case ww.Recovered():
            if rings.recovered(message):
                generation.recovering.discard(message.ring)
        case ww.BookClosed():
            generation.books.discard(message.book)
            rings.book_closed(message)
        case ww.Flushed(id=number):
            rings.retry()
            site.on_flushed(number)
        case ww.Drained():
            generation.drained.set()
            rings.count_lost("connections_cut", message.unpassed)
        case _:
            pass
    if fd is not None:
        os.close(fd)


def _note_memory(site: Site, generation: Generation, ready: ww.Ready) -> None:
    variants = (site.slots.variant(slot) for slot in generation.models.values())
    generation.needs_mb = sum(float(variant.needs.rss_mb) for variant in variants if variant is not None)
    generation.ready_mb = ready.own_mb
    generation.most_mb = liveness.allowed_mb(
        base_mb=ready.base_mb, ready_mb=ready.own_mb, needs_mb=generation.needs_mb,
        slack_mb=site.config.limits.leak_slack_mb,
    )  # fmt: skip
