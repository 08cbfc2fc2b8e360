"""Windows merge exactly, and only windows of one key merge."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire
from skerry_contract.errors import Malformed

from tests.unit.contract import values

NOW = w.Instant("0" * 32, 1, 2, True)


def countable(window: w.Window) -> dict[str, object]:
    """Everything that must merge exactly: all but the moments in time and what a newer program added."""
    return {name: getattr(window, name) for name in window.__struct_fields__ if name not in ("start", "end", "extra")}


@given(values.windows, values.windows)
def test_merging_is_commutative(a: w.Window, b: w.Window) -> None:
    assert countable(w.merge(a, b)) == countable(w.merge(b, a))


@given(values.windows, values.windows, values.windows)
def test_merging_is_associative(a: w.Window, b: w.Window, c: w.Window) -> None:
    assert countable(w.merge(w.merge(a, b), c)) == countable(w.merge(a, w.merge(b, c)))


@given(values.windows, values.windows)
def test_nothing_counted_is_lost_or_doubled(a: w.Window, b: w.Window) -> None:
    both = w.merge(a, b)
    for name in both.counts.__struct_fields__:
        assert getattr(both.counts, name) == getattr(a.counts, name) + getattr(b.counts, name)
    for part in both.latency.__struct_fields__:
        assert getattr(both.latency, part).n == getattr(a.latency, part).n + getattr(b.latency, part).n
        assert getattr(both.latency, part).total == getattr(a.latency, part).total + getattr(b.latency, part).total
    for name, feature in both.features.items():
        parts = [window.features[name] for window in (a, b) if name in window.features]
        assert feature.counts == tuple(map(sum, zip(*(part.counts for part in parts), strict=True)))
        assert feature.moments.squares == sum(part.moments.squares for part in parts)
    assert both.merged == a.merged + b.merged


@given(values.windows, values.windows)
def test_the_span_covers_both_windows_of_one_boot(a: w.Window, b: w.Window) -> None:
    a, b = (
        msgspec.structs.replace(
            x,
            start=w.Instant("0" * 32, min(x.start.boot_ns, x.end.boot_ns), 5, True),
            end=w.Instant("0" * 32, max(x.start.boot_ns, x.end.boot_ns), 4, True),
        )
        for x in (a, b)
    )
    both = w.merge(a, b)
    assert both.start.boot_ns == min(a.start.boot_ns, b.start.boot_ns)
    assert both.end.boot_ns == max(a.end.boot_ns, b.end.boot_ns)


def test_peaks_take_the_greater_and_sums_add_up() -> None:
    def of(**resources: int) -> w.Window:
        return w.Window(key=values.KEY, start=NOW, end=NOW, resources=resources)

    merged = w.merge(of(rss_mb_max=7, rss_mb_sum=10, rss_mb_n=2), of(rss_mb_max=9, rss_mb_sum=5, cpu_n=1))
    assert merged.resources == {"rss_mb_max": 9, "rss_mb_sum": 15, "rss_mb_n": 2, "cpu_n": 1}


@pytest.mark.parametrize("field", w.Key._fields)
def test_windows_of_different_keys_never_merge(field: str) -> None:
    other = {"stage": 3}.get(field, "other")
    a = w.Window(key=values.KEY, start=NOW, end=NOW)
    with pytest.raises(ValueError, match="never merge"):
        w.merge(a, msgspec.structs.replace(a, key=values.KEY._replace(**{field: other})))


def test_windows_of_other_bins_never_merge() -> None:
    def of(bins: int) -> w.Window:
        feature = w.FeatureCounts((1,) * bins, 0, 0, h.Moments())
        return w.Window(key=values.KEY, start=NOW, end=NOW, features={"f": feature})

    with pytest.raises(ValueError, match="bins"):
        w.merge(of(3), of(4))


@given(values.windows)
def test_a_window_of_ours_passes_the_check(window: w.Window) -> None:
    if values.sums_fit(window):
        assert w.check(window) is window


@pytest.mark.parametrize(("changes", "named"), values.IMPOSSIBLE)
def test_a_window_that_no_device_can_make_is_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(Malformed, match=named.replace(".", r"\.")):
        w.check(msgspec.structs.replace(values.EMPTY, **changes))


def test_a_window_without_later_fields_has_the_bytes_of_the_first_release() -> None:
    fields = msgspec.msgpack.decode(wire.encode(values.EMPTY))
    assert not set(w.LATER_FIELDS) & set(fields)
    tallied = msgspec.structs.replace(values.EMPTY, tallies={"null.imputed": 1})
    assert msgspec.msgpack.decode(wire.encode(tallied))["tallies"] == {"null.imputed": 1}
    assert wire.decode_window(wire.encode(tallied)) == tallied


@given(st.lists(st.integers(0, (1 << 64) - 1)), st.lists(st.integers(0, (1 << 64) - 1)))
def test_distinct_registers_merge_to_those_of_all(a: list[int], b: list[int]) -> None:
    assert h.merge_distinct(h.distinct_of(a), h.distinct_of(b)) == h.distinct_of(a + b)


@pytest.mark.parametrize("n", [10, 300, 5_000, 100_000])
def test_distinct_counts_are_within_four_standard_errors(n: int) -> None:
    hashes = [int.from_bytes(hashlib.sha256(str(i).encode()).digest()[:8], "big") for i in range(n)]
    assert h.distinct_estimate(h.distinct_of(hashes * 2)) == pytest.approx(n, rel=4 * 1.04 / 16)
