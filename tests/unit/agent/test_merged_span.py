"""A merged window spans what it was merged of, by the order of boots, whatever the wall clock said and however it was grouped."""

from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from skerry_agent.core import merging
from skerry_agent.store import Entry, Store, open_store
from skerry_contract import window as w
from skerry_contract import wire

KEY = w.Key("gas", "a" * 64, "v", "none", "", 0)
S = 1_000_000_000
AT = w.Instant("c" * 32, 1, 2, False)


def window(boot: str, start_s: int, end_s: int, wall_s: int) -> w.Window:
    """``wall_s``: what the wall clock says when that boot begins."""
    start, end = (
        w.Instant(boot * 32, at * S, (wall_s + at) * 1000, False) for at in (start_s, end_s)
    )  # fmt: skip
    return w.Window(key=KEY, start=start, end=end, counts=w.Counts(ok=1))


def spans(window: w.Window) -> tuple[tuple[str, int], tuple[str, int]]:
    return (window.start.boot_id[0], window.start.boot_ns // S), (window.end.boot_id[0], window.end.boot_ns // S)


def squeeze(store: Store) -> None:
    store.bound_bytes = store.pending()[1] - 100
    store.compact(AT, rounds=1)


def test_a_full_outbox_over_two_boots_without_a_clock(tmp_path: Path) -> None:
    numbers = itertools.count(1)

    def opened() -> Store:
        return open_store(
            tmp_path / "state.db", binding="m", device="d", new_epoch=lambda: f"{next(numbers):032x}", wall_s=0.0
        )[0]

    # Both boots begin in 1970: by the wall clock the short second one lies within the long first one.
    # What waited at the first start of all merges with nothing later: it may have been put back from a backup.
    boots = {"z": range(1), "a": range(0, 90_000, 3000), "b": range(60, 2060, 100)}
    for boot, at in boots.items():
        store = opened()
        try:
            store.note_boot(boot * 32)
            for start_s in at:
                part = window(boot, start_s, start_s + 90, 0)
                store.append([Entry(kind="window", body=wire.encode(part), key="k", inferences=1)])
                # Merged windows have later seqs than newer ones that are not merged yet.
                if store.pending()[0] > 12:
                    squeeze(store)
        finally:
            store.close()
    store = opened()
    try:
        while store.pending()[0] > 2:
            squeeze(store)
        batch = store.next_batch(set(), max_bytes=1 << 20, max_records=100)
        assert batch is not None
        _, record = batch.records
        merged = wire.decode_window(record.body)
        assert merged.counts.ok == 50
        assert spans(merged) == (("a", 0), ("b", 2050))
    finally:
        store.close()


@given(
    boots=st.lists(
        st.tuples(st.integers(0, 10**9), st.lists(st.integers(1, 500), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    data=st.data(),
)
def test_the_span_does_not_depend_on_how_windows_were_grouped(
    boots: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    parts = []
    for i, (wall_s, lengths) in enumerate(boots):
        at = 1
        for length in lengths:
            parts.append(window("abcdef"[i], at, at + length, wall_s))
            at += length
    order = [boot * 32 for boot in "abcdef"]
    left = data.draw(st.permutations(parts))
    while len(left) > 1:
        i = data.draw(st.integers(0, len(left) - 2))
        left[i : i + 2] = [merging.merge_two(left[i], left[i + 1], order)]
    assert spans(left[0]) == (spans(parts[0])[0], spans(parts[-1])[1])
    assert left[0].counts.ok == len(parts)
