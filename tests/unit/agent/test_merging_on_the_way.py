"""Windows that an outbox merged because it was full are what counting at once would have given, in every field."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from skerry_agent.store import Entry, open_store
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire

KEY = w.Key("gas", "a" * 64, "v", "none", "", 0)
AT = w.Instant("b" * 32, 1, 2, True)


def raw(rng: random.Random) -> dict[str, object]:
    """What one request leaves, before anybody counted it."""
    return {
        "age": rng.randrange(10_000),
        "kinds": rng.sample(w.GUARD_KINDS, 2),
        "attributions": {name: rng.uniform(-2, 2) for name in ("f0", "f1")},
        "reading": rng.randrange(1000),
        "place": rng.getrandbits(64),
        "distance": rng.randrange(1 << 20),
    }


def window(requests: list[dict[str, object]]) -> w.Window:
    """Those requests counted at once, one by one, by the contract's definitions."""
    tallies: dict[str, int] = {"explain.rows": len(requests)}
    for one in requests:
        for kind in one["kinds"]:  # type: ignore[attr-defined]
            tallies[kind] = tallies.get(kind, 0) + 1
    readings = [int(one["reading"]) for one in requests]  # type: ignore[call-overload]
    return w.Window(
        key=KEY,
        start=AT,
        end=AT,
        counts=w.Counts(ok=len(requests)),
        tallies=tallies,
        freshness=h.exponential_of(one["age"] for one in requests),  # type: ignore[misc]
        attributions={
            name: h.moments_of(h.quantize(abs(one["attributions"][name]), 0.0, 1.0) for one in requests)  # type: ignore[index]
            for name in ("f0", "f1")
        },
        resources={"device_x_sum": sum(readings), "device_x_n": len(readings), "device_x_max": max(readings)},
        distinct=h.distinct_of(one["place"] for one in requests),  # type: ignore[misc]
        shadows={
            "c" * 64: w.Shadow(
                pairs=len(requests),
                distance=h.exponential_of(one["distance"] for one in requests),  # type: ignore[misc]
            )
        },
    )


def countable(found: w.Window) -> dict[str, object]:
    return {name: getattr(found, name) for name in found.__struct_fields__ if name not in ("start", "end", "merged")}


@pytest.mark.parametrize("seed", range(3))
def test_a_full_outbox_merges_windows_exactly_in_all_they_hold(tmp_path: Path, seed: int) -> None:
    rng, numbers = random.Random(seed), itertools.count(1)
    store, _ = open_store(
        tmp_path / "state.db",
        binding="m",
        device="d-1",
        new_epoch=lambda: f"{next(numbers):032x}",
        wall_s=1.0,
        bound_bytes=64 << 20,
    )
    try:
        requests: list[dict[str, object]] = []
        for _ in range(4):
            for _ in range(8):
                some = [raw(rng) for _ in range(rng.randrange(1, 6))]
                requests += some
                entry = Entry(
                    kind="window", body=wire.encode(window(some)), key="/".join(map(str, KEY)), inferences=len(some)
                )
                store.append([entry])
            store.bound_bytes = store.pending()[1] - 500
            store.compact(AT)
        batch = store.next_batch(set(), max_bytes=1 << 24, max_records=1000)
        assert batch is not None
        assert {record.kind for record in batch.records} == {"window"}
        kept = [wire.decode_window(record.body) for record in batch.records]
        assert 1 <= len(kept) < 32
        # What the server adds up in its turn, in whatever order.
        rng.shuffle(kept)
        merged = kept[0]
        for one in kept[1:]:
            merged = w.merge(merged, one)
        assert countable(merged) == countable(window(requests))
    finally:
        store.close()
