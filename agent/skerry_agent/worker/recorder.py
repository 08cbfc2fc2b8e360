"""One model's requests, counted exactly once: ring first, windows later.

A request's slots are written before its reply is sent. From time to time the slots are folded into a window in memory
(``fold``), and the window is cut and sent with the range of positions it stands for. The supervisor commits window and
position in one transaction and says ``committed``; after a crash the next worker folds what lies above that position.

Slots are reused only after they were folded. While the supervisor cannot commit (a full disk, say) serving goes on: folded
counts wait in memory, and only a crash in that state loses records, which ``recover`` then counts.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt
from skerry_contract import window as w
from skerry_contract import wire

from skerry_agent import workerwire as ww
from skerry_agent.worker import book as b
from skerry_agent.worker import ring as r
from skerry_agent.worker.choosing import Choice, Row, Rows, Tally, seed_of
from skerry_agent.worker.distinct import Distinct
from skerry_agent.worker.entries import Count, Tensors, input_copies, output_copies, quick_count
from skerry_agent.worker.fold import Fold
from skerry_agent.worker.plan import Plan
from skerry_agent.worker.resources import cpu_time, peak_kb, rss_kb
from skerry_agent.worker.totals import Past, Totals

log = logging.getLogger(__name__)

FOLD_EVERY = 1024
"""Slots folded in one go in the middle of traffic: 1 ms for 30 features."""
MAX_WINDOW_ROWS = 1 << 22
"""Below the 2**23 at which a sum of squares could leave int64."""


class Recorder:
    """Counts the requests of one model. Not thread-safe: every call comes from the event loop's thread.

    Args:
        later: runs a function soon, after the reply at hand (``loop.call_soon``).
        send: takes ``WindowCut`` messages to the supervisor.
        predictions: how many are remembered for late labels, in a book beside the ring; 0 for none.

    Attributes:
        prefix: with a row's position in hexadecimal digits after it, the name of the row, with a book and without.
        book: of the ring; None when nothing can be labelled.
        ok: ``count``, or what does the same faster where requests are of the commonest kind; another one after a ``rekey``.
        prediction_prefix: with the position in hexadecimal digits after it, the id of a prediction; empty without a book.
    """

    ok: Count

    def __init__(
        self,
        key: w.Key,
        plan: Plan,
        *,
        ring: str,
        boot_id: str,
        send: Callable[[ww.WindowCut], None],
        later: Callable[[Callable[[], None]], object],
        capacity: int = r.CAPACITY,
        predictions: int = 0,
    ) -> None:
        self.plan = plan
        self._explain: Callable[[list[Row]], int] | None = None
        self._sample: Callable[[Rows, Tally], None] | None = None
        self._labelled = b.labelled_output(plan) if predictions else None
        self._predictions = max(predictions, capacity)
        self.book: b.Book | None = None
        self.prediction_prefix = b""
        self._width = plan.width
        self._direct = plan.direct
        self._input_names = tuple(dict.fromkeys(f.input for f in plan.features))
        self._output_names = tuple(o.name for o in plan.outputs)
        self._send = send
        self._later = later
        self._boot_id = boot_id
        self._capacity = capacity
        self._fold_every = min(FOLD_EVERY, capacity // 4)
        self.max_rows = capacity // 4 if plan.width else 1 << 32
        self._past = Past()
        self._distinct: Distinct | None = None
        self.cold_ms = 0
        self._attach(key, ring)

    def _attach(self, key: w.Key, path: str) -> None:
        token = os.urandom(5).hex()
        prefix = f"{key.model}-{token}-"
        seed = seed_of(prefix)
        header = r.Header(key=key, plan=self.plan, capacity=self._capacity, boot_id=self._boot_id, seed=seed)
        self.key = key
        self.prefix = prefix
        self._choice = Choice(self.plan, seed, explain=self._explain, sample=self._sample)
        self.ring = r.Ring.create(path, header)
        if self._labelled is not None:
            about = b.Header(
                key=key,
                token=token,
                output=self._labelled,
                capacity=self._predictions,
                records=b.RECORDS,
                boot_id=self._boot_id,
            )
            self.book = b.Book.create(b.path_beside(path), about)
            self.prediction_prefix = prefix.encode()
        self._fold = Fold(self.plan, self._choice)
        self._folded = self._cut = 0
        self._folding = False
        self.ring.due = self._fold_every
        self._from_inputs = input_copies(self.plan, self.ring.values)
        self._from_outputs = output_copies(self.plan, self.ring.values)
        self._choose_count()

    def _choose_count(self) -> None:
        # Counting what is different hashes every request: beside it the quick way would gain nothing.
        self.ok = (
            self.count if self._distinct is not None else quick_count(self.ring, self.plan, self.count, self._wrote)
        )

    def count_distinct(self, distinct: Distinct) -> None:
        """Counts different requests from now on."""
        self._distinct = distinct
        self._choose_count()

    # --- one request ------------------------------------------------------------------------------------------------

    def count(
        self,
        inputs: Tensors,
        outputs: Tensors,
        rows: int,
        total_ns: int,
        queue_ns: int,
        transform_ns: int,
        infer_ns: int,
        at_ns: int,
        flags: int = 0,
        ident: int = 0,
        kinds: int = 0,
        age_ms: int = -1,
    ) -> None:
        """Counts an answered request; call before its reply is sent.

        Args:
            inputs: as the application sent them.
            outputs: as the application gets them.
            rows: size of the first dimension, at most ``max_rows``.
            total_ns: from the whole request read to the reply ready.
            queue_ns: of it, waiting for the inference thread.
            transform_ns: of it, in transforms.
            infer_ns: of it, in the runtime.
            at_ns: monotonic clock now.
            flags: ``ring.RETRY``, ``CACHED``, ``FALLBACK``.
            ident: digest of the client's own id, 0 for none.
            kinds: what guards did, a bit per ``window.GUARD_KINDS``.
            age_ms: of the request's oldest feature; -1 where nobody said.
        """
        ring = self.ring
        if kinds or age_ms >= 0:
            flags |= r.MARKED
            age_ms = min(age_ms, r.OLDEST_MS)
        if rows == 1 and self._direct:
            try:
                slot = r.pack(
                    r.OK,
                    flags | r.VALUES,
                    ring.written & r.TAG,
                    1,
                    total_ns,
                    queue_ns,
                    transform_ns,
                    infer_ns,
                    at_ns,
                    ident,
                    kinds,
                    age_ms,
                )
                for name in self._input_names:
                    slot += inputs[name].tobytes()
                for name in self._output_names:
                    slot += outputs[name].tobytes()
                ring.append(slot + ring.padding)
            except (KeyError, IndexError):
                # Not of the shape that the manifest says.
                times = total_ns, queue_ns, transform_ns, infer_ns, at_ns, ident, kinds, age_ms
                self._some(inputs, outputs, 1, times, flags)
        elif self._width:
            times = total_ns, queue_ns, transform_ns, infer_ns, at_ns, ident, kinds, age_ms
            self._some(inputs, outputs, rows, times, flags)
        else:
            tag = ring.written & r.TAG
            times = total_ns, queue_ns, transform_ns, infer_ns, at_ns, ident, kinds, age_ms
            ring.write(r.pack(r.OK, flags, tag, rows, *times))
            ring.publish(1)
        if self._distinct is not None:
            self._distinct.add(inputs, rows)
        if ring.written >= ring.due:
            self._wrote()

    def other(self, outcome: int, total_ns: int, at_ns: int, flags: int = 0, kinds: int = 0) -> None:
        """Counts a request that got no answer: ``ring.INVALID``, ``FAILED`` or ``SHED``. ``kinds`` as in ``ok``."""
        self._past.unanswered_ns += total_ns
        flags |= r.MARKED if kinds else 0
        self.ring.write(r.pack(outcome, flags, self.ring.written & r.TAG, 0, total_ns, 0, 0, 0, at_ns, 0, kinds, -1))
        self.ring.publish(1)
        if self.ring.written >= self.ring.due:
            self._wrote()

    def _some(self, inputs: Tensors, outputs: Tensors, rows: int, times: tuple[int, ...], flags: int) -> None:
        ring = self.ring
        slots = max(1, rows)
        if ring.written + slots - self._folded > ring.capacity:
            self.fold()
        flags |= r.VALUES if rows else 0
        done = 0
        try:
            while done < rows:
                low = (ring.written + done) % ring.capacity
                n = min(rows - done, ring.capacity - low)
                slots_now, rows_now = slice(low, low + n), slice(done, done + n)
                for copy in self._from_inputs:
                    copy.many(slots_now, rows_now, inputs[copy.name])
                for copy in self._from_outputs:
                    copy.many(slots_now, rows_now, outputs[copy.name])
                if rows > 1:
                    part = ring.meta[low : low + n]
                    part["outcome"], part["flags"], part["rows"] = r.ROW, flags, 0
                    part["at_ns"], part["ident"] = times[4:6]
                    part["tag"] = np.arange(ring.written + done, ring.written + done + n) & r.TAG
                done += n
        except (KeyError, ValueError, TypeError, IndexError) as error:
            flags, slots = self._unreadable(flags, error), 1
        ring.write(r.pack(r.OK, flags, ring.written & r.TAG, rows, *times))
        ring.publish(slots)

    def _unreadable(self, flags: int, error: Exception) -> int:
        # The model answered in another shape than its manifest says. The request counts, its values cannot.
        log.warning("values not counted model=%s error=%s", self.key.model, error)
        return flags & ~r.VALUES

    def _wrote(self) -> None:
        if self.ring.written - self._folded >= self.ring.capacity:
            self.fold()
        elif not self._folding:
            self._folding = True
            self._later(self._fold_soon)

    def _fold_soon(self) -> None:
        self._folding = False
        self.fold()
        # Early, so that the supervisor can commit before the slots are needed again.
        uncommitted = self.ring.written - max(self._cut, self.ring.committed)
        if uncommitted >= self.ring.capacity // 2 or self._fold.slots >= MAX_WINDOW_ROWS:
            self.cut()

    # --- windows ----------------------------------------------------------------------------------------------------

    def fold(self) -> None:
        """Folds every record written so far into the window under way."""
        if self._folded < self.ring.written:
            if self.book is not None:
                self.book.fill(self.ring, self.ring.written)
            self._fold.add_ring(self.ring, self._folded, self.ring.written)
            self._folded = self.ring.written
            self.ring.due = self._folded + self._fold_every

    def cut(self) -> None:
        """Sends the window of everything since the last cut; nothing when nothing happened."""
        self.fold()
        slept = self.ring.slept()
        if not slept:
            self.ring.look_at_clocks()
        done = self._fold
        if self._cut == self._folded and not done.beside:
            self.ring.look_at_clocks()
            return
        # A window of no request holds what was found out later about older ones.
        first, last = done.span_ns if done.slots else (time.monotonic_ns(),) * 2
        window = done.window(self.key, self.ring.instant(first), self.ring.instant(last), self._resources())
        if self._distinct is not None:
            window = msgspec.structs.replace(window, distinct=self._distinct.take())
        self._send(
            ww.WindowCut(
                ring=self.ring.path, start=self._cut, upto=self._folded, body=wire.encode(window), inferences=done.ok
            )
        )
        self._past.add(done, window.end.wall_ms)
        self._cut = self._folded
        self._fold = Fold(self.plan, self._choice)
        if slept:
            # What was counted before a sleep keeps the times of before it; what follows has those of after it.
            self.ring.look_at_clocks()

    def cut_if_slept(self) -> None:
        """Ends the window under way when the device was suspended meanwhile."""
        if self.ring.slept():
            self.cut()

    def rekey(self, key: w.Key, path: str) -> int:
        """Cuts the old key's last window and counts under the new key, in a new ring with a new book.

        Returns:
            The old ring's last position. The old book is the caller's, who took it from ``book`` before.
        """
        self.cut()
        upto = self.ring.written
        self.ring.close()
        self._attach(key, path)
        return upto

    def show(
        self,
        *,
        explain: Callable[[list[Row]], int] | None = None,
        sample: Callable[[Rows, Tally], None] | None = None,
    ) -> None:
        """Says who explains chosen rows and who keeps samples, from the next fold on. See ``choosing.Choice``."""
        self._explain, self._sample = explain, sample
        self.fold()
        self._choice = Choice(self.plan, self.ring.header.seed, explain=explain, sample=sample)
        self._fold.show(self._choice)

    def sample_with(self, sample: Callable[[Rows, Tally], None] | None) -> None:
        """Says anew who keeps samples; who explains stays."""
        self.show(explain=self._explain, sample=sample)

    def tally(self, name: str, n: int) -> None:
        """Adds to one of the ``tallies`` of the window under way."""
        self._fold.tally(name, n)

    def explained(self, features: tuple[str, ...], attributions: npt.NDArray[np.float64], scale: float) -> None:
        """Counts explained rows, see ``Fold.explained``."""
        self._fold.explained(features, attributions, scale)

    def values_at(self, position: int) -> npt.NDArray[np.floating] | None:
        """What an answered row still in the ring holds, as the plan lays it out; None when it is not there."""
        ring = self.ring
        if not max(0, ring.written - ring.capacity) <= position < ring.written or not self._width:
            return None
        slot = position % ring.capacity
        kept = ring.meta["flags"][slot] & r.VALUES and ring.meta["outcome"][slot] in (r.OK, r.ROW)
        return ring.values[slot].copy() if kept else None

    def values_of(self, position: int, row: int) -> npt.NDArray[np.floating]:
        """What one row of an answered request holds, as the plan lays it out.

        Args:
            position: of the request, and so of its first row.
            row: which of its rows.

        Raises:
            LookupError: it is not there; the message says how.
        """
        ring = self.ring
        if position < ring.written - ring.capacity:
            raise LookupError("newer requests took its place")
        if not self._width or position >= ring.written or ring.meta["outcome"][position % ring.capacity] != r.OK:
            raise LookupError("no such prediction")
        # The slots behind a request are its rows as long as they say so; the next request's are another client's.
        slots = np.arange(position, min(position + row + 1, ring.written)) % ring.capacity
        if not 0 <= row < len(slots) or np.any(ring.meta["outcome"][slots[1:]] != r.ROW):
            raise LookupError(f"the request has no row {row}")
        values = self.values_at(position + row)
        if values is None:
            raise LookupError("its values were not kept")
        return values

    def committed(self, path: str, upto: int) -> None:
        """Notes that the store holds ``path`` up to ``upto``; of an older ring it is of no interest any more."""
        if path == self.ring.path:
            self.ring.commit(upto)

    def totals(self) -> Totals:
        """What was counted so far, under whatever key."""
        self.fold()
        return self._past.totals(self._fold, self._ms_of(self._fold))

    def health(self, since_s: float) -> ww.ModelHealth:
        """Counts since the recorder was made."""
        self.fold()
        return self._past.health(self._fold, since_s)

    def _ms_of(self, fold: Fold) -> int:
        return self.ring.instant(fold.span_ns[1]).wall_ms if fold.slots else 0

    def _resources(self) -> dict[str, int]:
        rss = rss_kb()
        cold_ms, self.cold_ms = self.cold_ms, 0
        cold = {"cold_start_ms_sum": cold_ms, "cold_start_ms_max": cold_ms, "cold_start_n": 1} if cold_ms else {}
        # CPU time and memory are the worker's, so of all models it serves.
        return {
            **cold,
            "worker_cpu_us_sum": cpu_time.since_us(),
            "worker_rss_kb_max": max(rss, 0),
            "worker_peak_kb_max": peak_kb(),
            "worker_rss_kb_sum": rss,
            "worker_rss_n": 1,
        }
