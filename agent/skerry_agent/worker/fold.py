"""Folding ring slots into a window, many rows at a time.

Every number equals what the contract's one-by-one definitions give (``histogram.exponential_of``, ``edge_bin``,
``quantize``, ``moments_of``); a property test compares both. Sums stay integers: float sums are taken only over integers
whose total stays below 2**53.

Outputs: for a classifier the predicted class of a row is the first largest probability; ``moments`` quantizes its
confidence with centre 0 and scale 1; ``estimated`` is CBPE (Bialek et al. 2024, eq. 1): the calibrated probability of being
right, summed per predicted class.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from skerry_contract import histogram as h
from skerry_contract import window as w

from skerry_agent.worker import ring as r
from skerry_agent.worker.choosing import Choice
from skerry_agent.worker.plan import Plan

CHUNK = 4096
"""Most rows folded at once: 4096 * 2**20 * 2**20 = 2**52, so sums of squares of q are exact in float64."""

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_BOUNDS = np.array(h.BOUNDS)
_BUCKETS = h.MAX_INDEX - h.MIN_INDEX + 1
_FEW_EDGES = 24
_KINDS = 8 * r.META["kinds"].itemsize
PARTS = r.TIMES


class LatencyFold:
    """An exponential histogram under way. Values are non-negative integers: nanoseconds, or milliseconds of ages."""

    __slots__ = ("counts", "total", "zero")

    def __init__(self) -> None:
        self.counts: _Ints = np.zeros(_BUCKETS, np.int64)
        self.zero = 0
        self.total = 0

    def add(self, values: _Ints) -> None:
        """Counts the values."""
        self.total += int(values.sum())
        positive = values[values > 0]
        self.zero += len(values) - len(positive)
        if len(positive):
            mantissa, exponent = np.frexp(positive.astype(np.float64))
            index = (exponent.astype(np.int64) - 1) * 2**h.SCALE + np.searchsorted(_BOUNDS, mantissa, "left") - 1
            self.counts += np.bincount(index - h.MIN_INDEX, minlength=_BUCKETS)

    def merge(self, other: LatencyFold) -> None:
        """Adds another fold's counts."""
        self.counts += other.counts
        self.zero += other.zero
        self.total += other.total

    def result(self) -> h.Exponential:
        """The histogram so far."""
        found = {int(i) + h.MIN_INDEX: int(self.counts[i]) for i in np.flatnonzero(self.counts)}
        return h.exponential_from(found, zero=self.zero, total=self.total)


class Fold:
    """Counts of one key under way: add slots, then take the window."""

    def __init__(self, plan: Plan, choice: Choice | None = None) -> None:
        """Args: ``choice`` is shown the answered rows; None for nobody."""
        self.plan = plan
        self._choice: Choice | None = None
        self.show(choice)
        self._tallies: dict[str, int] = {}
        self._attributions: dict[str, h.Moments] = {}
        n = len(plan.features)
        self._outcomes: _Ints = np.zeros(r.OUTCOMES, np.int64)
        self._flags: _Ints = np.zeros(3, np.int64)
        self._kinds: _Ints = np.zeros(_KINDS, np.int64)
        self._ages = LatencyFold()
        self._rows = 0
        self.latency = {part: LatencyFold() for part in PARTS}
        self._edges = [np.array(f.edges) for f in plan.features]
        most = max((len(f.edges) for f in plan.features), default=0)
        # Shorter rows of edges are filled up with NaN, which no value reaches.
        self._edge_table = np.full((n, most), np.nan)
        for row, edges in zip(self._edge_table, self._edges, strict=True):
            row[: len(edges)] = edges
        self._bins: _Ints = np.zeros((n, most + 1), np.int64)
        self._null: _Ints = np.zeros(n, np.int64)
        self._outside: _Ints = np.zeros(n, np.int64)
        self._moments: _Ints = np.zeros((3, n), np.int64)
        self._centre = np.array([[f.centre] for f in plan.features]).reshape(n, 1)
        self._scale = np.array([[f.scale] for f in plan.features]).reshape(n, 1)
        self._low = np.array([[-np.inf if f.low is None else f.low] for f in plan.features]).reshape(n, 1)
        self._high = np.array([[np.inf if f.high is None else f.high] for f in plan.features]).reshape(n, 1)
        self._outputs = [_OutputFold(o.classes, np.array(o.knots_x), np.array(o.knots_y)) for o in plan.outputs]
        classes = plan.outputs[0].classes if plan.outputs else 0
        self._slices: list[_Ints] = [np.zeros(1 + classes, np.int64) for _ in plan.slices]
        self._first_ns = self._last_ns = 0
        self.slots = 0

    @property
    def ok(self) -> int:
        """Answered requests so far."""
        return int(self._outcomes[r.OK])

    def counts(self) -> w.Counts:
        """Requests by outcome so far."""
        return w.Counts(
            ok=int(self._outcomes[r.OK]),
            invalid=int(self._outcomes[r.INVALID]),
            failed=int(self._outcomes[r.FAILED]),
            shed=int(self._outcomes[r.SHED]),
            rows=self._rows,
            retries=int(self._flags[0]),
            cached=int(self._flags[1]),
            fallback=int(self._flags[2]),
        )

    def add_ring(self, ring: r.Ring, start: int, upto: int) -> None:
        """Folds positions ``[start, upto)``, which must still be in the ring."""
        while start < upto:
            low = start % ring.capacity
            high = min(low + (upto - start), ring.capacity, low + CHUNK)
            self.add(ring.meta[low:high], ring.values[low:high], np.arange(start, start + high - low))
            start += high - low

    def show(self, choice: Choice | None) -> None:
        """Says who is shown the rows that are added from now on."""
        self._choice = None if choice is None or choice.idle else choice

    def tally(self, name: str, n: int) -> None:
        """Adds to one of the window's ``tallies``."""
        self._tallies[name] = self._tallies.get(name, 0) + n

    def explained(self, features: tuple[str, ...], attributions: _Floats, scale: float) -> None:
        """Adds explained rows: attributions [rows, features], of which the absolute values are quantized by ``scale``."""
        for i, name in enumerate(features):
            found = h.moments_of(h.quantize(abs(float(v)), 0.0, scale) for v in attributions[:, i])
            before = self._attributions.get(name)
            self._attributions[name] = found if before is None else h.merge_moments(before, found)
        self.tally("explain.rows", len(attributions))

    @property
    def beside(self) -> bool:
        """Whether it holds what came from no slot."""
        return bool(self._tallies)

    def add(
        self,
        meta: npt.NDArray[np.void],
        values: npt.NDArray[np.floating],
        positions: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Folds at most ``CHUNK`` slots. ``positions``: theirs in the ring, where rows are to be chosen."""
        if not len(meta):
            return
        outcome = meta["outcome"]
        flags = meta["flags"]
        if not self.slots:
            self._first_ns = int(meta["at_ns"][0])
        self._last_ns = int(meta["at_ns"][-1])
        self.slots += len(meta)
        self._outcomes += np.bincount(outcome, minlength=r.OUTCOMES)
        ok = outcome == r.OK
        all_ok = bool(ok.all())
        answered = meta if all_ok else meta[ok]
        self._rows += int(answered["rows"].sum())
        for part in PARTS:
            self.latency[part].add(answered[part])
        if flags.any():
            request = outcome != r.ROW
            for i, flag in enumerate((r.RETRY, r.CACHED, r.FALLBACK)):
                self._flags[i] += int(np.count_nonzero((flags & flag != 0) & request))
            marked = (flags & r.MARKED != 0) & request
            if marked.any():
                self._add_marks(meta["kinds"][marked], meta["age_ms"][marked])
            counted = flags & r.VALUES != 0
            if counted.any():
                kept = values if counted.all() else values[counted]
                predicted = self._add_values(np.ascontiguousarray(kept.T, np.float64))
                if self._choice is not None and positions is not None:
                    # What the fallback model answered is not this model's.
                    own = flags[counted] & r.FALLBACK == 0
                    self._choice.look(
                        positions[counted][own],
                        meta["at_ns"][counted][own],
                        kept[own],
                        None if predicted is None else predicted[own],
                        self.tally,
                    )

    def _add_marks(self, kinds: npt.NDArray[np.uint32], ages: npt.NDArray[np.int32]) -> None:
        for i in range(_KINDS):
            self._kinds[i] += np.count_nonzero(kinds & np.uint32(1 << i))
        self._ages.add(ages[ages >= 0].astype(np.int64))

    def _add_values(self, columns: _Floats) -> _Ints | None:
        n = len(self.plan.features)
        rows = columns.shape[1]
        features = columns[:n]
        if n:
            self._add_features(features, rows)
        predicted = self._add_outputs(columns[n:])
        for counts, part in zip(self._slices, self.plan.slices, strict=True):
            inside = (features[part.feature] >= part.low) & (features[part.feature] < part.high)
            counts[0] += np.count_nonzero(inside)
            if predicted is not None:
                chosen = predicted[inside]
                counts[1:] += np.bincount(chosen[chosen >= 0], minlength=len(counts) - 1)
        return predicted

    def _add_features(self, features: _Floats, rows: int) -> None:
        # Smallest and largest of each feature: NaN when any value is, so this finds nulls as well.
        smallest, largest = features.min(1), features.max(1)
        null: npt.NDArray[np.bool_] | None = None
        if np.isnan(smallest).any():
            null = np.isnan(features)
            nulls = null.sum(1)
            self._null += nulls
            self._moments[0] += rows - nulls
        else:
            self._moments[0] += rows
        if null is not None or (smallest < self._low[:, 0]).any() or (largest > self._high[:, 0]).any():
            # NaN is in no range and outside of none: both comparisons are false.
            self._outside += ((features < self._low) | (features > self._high)).sum(1)
        limit = float(h.Q_LIMIT)
        with np.errstate(over="ignore", invalid="ignore"):
            q = features - self._centre
            q /= self._scale
            q *= 1 << h.Q_BITS
        np.clip(q, -limit, limit, out=q)
        np.rint(q, out=q)
        if null is not None:
            q[null] = 0.0
        self._moments[1] += q.sum(1).astype(np.int64)
        self._moments[2] += np.einsum("ij,ij->i", q, q).astype(np.int64)
        self._bins += self._bin_counts(features, null)

    def _bin_counts(self, features: _Floats, null: npt.NDArray[np.bool_] | None) -> _Ints:
        """Per feature, how many values fell in each bin, as ``histogram.edge_bin`` says."""
        n, most = self._edge_table.shape
        if most > _FEW_EDGES:
            found = np.zeros_like(self._bins)
            for i, edges in enumerate(self._edges):
                row = features[i] if null is None else features[i][~null[i]]
                found[i, : len(edges) + 1] = np.bincount(edges.searchsorted(row, "right"), minlength=len(edges) + 1)
            return found
        # A bin holds what reached its lower edge and not its upper one. While edges are few, comparing with all of them is
        # several times as fast as searching: a search of unsorted values mispredicts every branch.
        rows = features.shape[1]
        reached = np.zeros((n, rows + -rows % 8), np.bool_)
        compared = reached[:, :rows]
        above = np.zeros((n, most + 2), np.int64)
        above[:, 0] = rows
        for i, edge in enumerate(self._edge_table.T):
            np.greater_equal(features, edge[:, None], out=compared)
            above[:, i + 1] = _true_per_row(reached)
        found = above[:, :-1] - above[:, 1:]
        if null is not None:
            # NaN reaches no edge and so was taken for bin 0.
            found[:, 0] -= null.sum(1)
        return found

    def _add_outputs(self, columns: _Floats) -> _Ints | None:
        first: _Ints | None = None
        at = 0
        for output, fold in zip(self.plan.outputs, self._outputs, strict=True):
            part = columns[at : at + output.width]
            at += output.width
            if output.raw:
                predicted = part.argmax(0).astype(np.int64)
                confidence = part.max(0)
            else:
                confidence = part[1]
                predicted = np.where(np.isnan(part[0]), 0, part[0]).astype(np.int64)
            predicted[np.isnan(confidence)] = -1
            fold.add(predicted, confidence)
            first = predicted if first is None else first
        return first

    def window(self, key: w.Key, start: w.Instant, end: w.Instant, resources: dict[str, int]) -> w.Window:
        """The window of everything added."""
        counted = bool(self._moments[0].any() or self._null.any())
        return w.Window(
            key=key,
            start=start,
            end=end,
            counts=self.counts(),
            latency=w.Latency(
                total=self.latency["total_ns"].result(),
                queue=self.latency["queue_ns"].result(),
                transform=self.latency["transform_ns"].result(),
                infer=self.latency["infer_ns"].result(),
            ),
            features={
                f.name: w.FeatureCounts(
                    tuple(self._bins[i, : len(f.edges) + 1].tolist()),
                    int(self._null[i]),
                    int(self._outside[i]),
                    self._moments_of(i),
                )
                for i, f in enumerate(self.plan.features)
                if counted
            },
            outputs={
                o.name: fold.result()
                for o, fold in zip(self.plan.outputs, self._outputs, strict=True)
                if fold.moments[0]
            },
            slices={
                part.name: w.SliceCounts(int(counts[0]), tuple(counts[1:].tolist()))
                for part, counts in zip(self.plan.slices, self._slices, strict=True)
                if counts[0]
            },
            resources=resources,
            tallies={**{kind_name(i): int(n) for i, n in enumerate(self._kinds) if n}, **self._tallies},
            freshness=self._ages.result(),
            attributions=dict(self._attributions),
        )

    def _moments_of(self, i: int) -> h.Moments:
        feature = self.plan.features[i]
        if feature.pii:
            # Of a single row they would be its value.
            counts = self._bins[i, : len(feature.edges) + 1].tolist()
            return h.binned_moments(counts, feature.edges, feature.centre, feature.scale)
        n, total, squares = self._moments[:, i].tolist()
        return h.Moments(n=n, total=total, squares=squares)

    @property
    def span_ns(self) -> tuple[int, int]:
        """``at_ns`` of the first and last slot added."""
        return self._first_ns, self._last_ns


def kind_name(bit: int) -> str:
    """What a bit of a slot's ``kinds`` is called in ``tallies``, also one that a newer release wrote."""
    return w.GUARD_KINDS[bit] if bit < len(w.GUARD_KINDS) else f"kind.{bit}"


def _true_per_row(flags: npt.NDArray[np.bool_]) -> _Ints:
    """How many are true in each row; a row is a multiple of 8 long.

    Eight at a time: a word's bytes are eight flags, and the sum of at most 255 words has eight counts that cannot overflow.
    """
    words = flags.view(np.uint64)
    total = np.zeros(len(flags), np.int64)
    for start in range(0, words.shape[1], 255):
        part: npt.NDArray[np.uint64] = words[:, start : start + 255].sum(1)
        total += part.view(np.uint8).reshape(-1, 8).sum(1, dtype=np.int64)
    return total


class _OutputFold:
    def __init__(self, classes: int, knots_x: _Floats, knots_y: _Floats) -> None:
        self.counts: _Ints = np.zeros(classes, np.int64)
        self.estimated: _Ints = np.zeros(classes if len(knots_x) else 0, np.int64)
        self.moments: _Ints = np.zeros(3, np.int64)
        self._knots = (knots_x, knots_y)

    def add(self, predicted: _Ints, confidence: _Floats) -> None:
        known = predicted >= 0
        if not known.all():
            predicted, confidence = predicted[known], confidence[known]
        classes = len(self.counts)
        self.counts += np.bincount(predicted, minlength=classes)
        limit = float(h.Q_LIMIT)
        q = np.rint(np.clip(confidence * (1 << h.Q_BITS), -limit, limit))
        self.moments += np.array([len(q), int(q.sum()), int((q * q).sum())])
        if len(self.estimated):
            right = np.rint(np.interp(confidence, *self._knots) * (1 << h.P_BITS))
            # Weights are integers of at most 2**20 and at most 4096 of them: exact in float64.
            self.estimated += np.bincount(predicted, right, minlength=classes).astype(np.int64)

    def result(self) -> w.OutputCounts:
        n, total, squares = (int(v) for v in self.moments)
        return w.OutputCounts(
            tuple(self.counts.tolist()),
            h.Moments(n=n, total=total, squares=squares),
            tuple(self.estimated.tolist()),
        )
