"""What guards did and how old features were, counted with each request: ring first, also after kill -9, also of version 3."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_agent import workerwire as ww
from skerry_agent.worker import mapped
from skerry_agent.worker import ring as r
from skerry_agent.worker.fold import Fold
from skerry_agent.worker.plan import FeatureColumn, OutputColumn, Plan
from skerry_agent.worker.recorder import Recorder
from skerry_agent.worker.recovery import recover
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire

KEY = w.Key("gas", "0" * 64, "onnx-fp32", "none", "", 0)
PLAN = Plan(
    features=(FeatureColumn(name="a", input="x", column=0, edges=(0.0,)),),
    outputs=(OutputColumn(name="p", classes=2),),
    whole=("x",),
    direct=True,
)
BOOT = "0" * 32
BITS = len(w.GUARD_KINDS)

marks = st.tuples(st.integers(0, 2**BITS - 1), st.one_of(st.just(-1), st.integers(0, 10**7)), st.integers(1, 9))


def answers(rows: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return {"x": np.full((rows, 1), 0.5, "f4")}, {"p": np.full((rows, 2), 0.5, "f4")}


def expected(requests: list[tuple[int, int, int]], refused: list[int]) -> tuple[dict[str, int], h.Exponential]:
    tallies: dict[str, int] = {}
    for kinds in [kinds for kinds, _, _ in requests] + refused:
        for i, name in enumerate(w.GUARD_KINDS):
            if kinds >> i & 1:
                tallies[name] = tallies.get(name, 0) + 1
    return tallies, h.exponential_of(age for _, age, _ in requests if age >= 0)


@given(st.lists(marks, min_size=1, max_size=60), st.lists(st.integers(0, 2**BITS - 1), max_size=9), st.data())
@settings(max_examples=60, deadline=None)
def test_marks_of_requests_come_back_exactly_however_windows_are_cut(
    tmp_path_factory: pytest.TempPathFactory,
    requests: list[tuple[int, int, int]],
    refused: list[int],
    data: st.DataObject,
) -> None:
    sent: list[w.Window] = []
    recorder = Recorder(
        KEY,
        PLAN,
        ring=str(tmp_path_factory.mktemp("marks") / "1.ring"),
        boot_id=BOOT,
        send=lambda cut: sent.append(wire.decode_window(cut.body)),
        later=lambda act: act(),
        capacity=64,
    )
    for kinds, age, rows in requests:
        recorder.ok(*answers(rows), rows, 9, 0, 1, 1, 5, kinds=kinds, age_ms=age)
        if data.draw(st.integers(0, 4)) == 0:
            recorder.cut()
    for kinds in refused:
        recorder.other(r.INVALID, 3, 6, kinds=kinds)
    recorder.cut()
    recorder.ring.close(remove=True)
    merged = sent[0]
    for window in reversed(sent[1:]):
        merged = w.merge(window, merged)
    assert (merged.tallies, merged.freshness) == expected(requests, refused)
    assert (merged.counts.ok, merged.counts.invalid) == (len(requests), len(refused))
    assert merged.counts.rows == sum(rows for _, _, rows in requests)


def test_a_request_without_marks_leaves_a_window_without_their_fields(tmp_path: Path) -> None:
    sent: list[bytes] = []
    recorder = Recorder(
        KEY,
        PLAN,
        ring=str(tmp_path / "1.ring"),
        boot_id=BOOT,
        send=lambda cut: sent.append(cut.body),
        later=lambda a: a(),
    )
    recorder.ok(*answers(1), 1, 9, 0, 1, 1, 5)
    recorder.other(r.SHED, 3, 6)
    recorder.cut()
    assert not {"tallies", "freshness"} & set(msgspec.msgpack.decode(sent[0]))


def test_an_age_above_24_days_counts_as_24_days(tmp_path: Path) -> None:
    sent: list[w.Window] = []
    recorder = Recorder(
        KEY,
        PLAN,
        ring=str(tmp_path / "1.ring"),
        boot_id=BOOT,
        send=lambda cut: sent.append(wire.decode_window(cut.body)),
        later=lambda act: act(),
    )
    recorder.ok(*answers(1), 1, 9, 0, 1, 1, 5, age_ms=1 << 40)
    recorder.cut()
    assert sent[0].freshness == h.exponential_of([r.OLDEST_MS])


_CHILD = """
import sys, time
from tests.unit.agent.worker.test_marks import BOOT, KEY, PLAN, answers
from skerry_agent.worker import ring as r
from skerry_agent.worker.recorder import Recorder
recorder = Recorder(KEY, PLAN, ring=sys.argv[1], boot_id=BOOT, send=lambda cut: None, later=lambda act: act(), capacity=64)
for i in range(40):
    recorder.ok(*answers(1 + i % 3), 1 + i % 3, 9, 0, 1, 1, 5, kinds=1 << i % 3, age_ms=i)
    if i % 10 == 0:
        recorder.other(r.INVALID, 3, 6, kinds=1)
print("written", recorder.ring.written, flush=True)
time.sleep(60)
"""


def test_marks_survive_kill_9(tmp_path: Path) -> None:
    path = str(tmp_path / "1.ring")
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, path], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert child.stdout is not None
    said = child.stdout.readline().split()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    written = int(said[1])
    start = written - 64
    cut, recovered = recover(ww.Recover(ring=path, start=start), boot_id=BOOT)
    assert (recovered.lost, recovered.damage, recovered.upto) == (0, "", written)
    assert cut is not None
    found = wire.decode_window(cut.body)
    # The last 64 positions, told by what the child does: request i takes 1 + i % 3, and every tenth is followed by another.
    at, kept, refused = 0, [], []
    for i in range(40):
        if at >= start:
            kept.append((1 << i % 3, i, 1 + i % 3))
        at += 1 + i % 3
        if i % 10 == 0:
            refused += [1] if at >= start else []
            at += 1
    assert (found.tallies, found.freshness) == expected(kept, refused)


# --- what the release before left -----------------------------------------------------------------------------------


def ring_of_version_3(
    path: Path, slots: list[tuple[int, int, int, int, tuple[float, ...]]], capacity: int = 64
) -> None:
    """As the release before wrote it: (outcome, flags, rows, total_ns, values) per slot."""
    header = r.Header(key=KEY, plan=PLAN, capacity=capacity, boot_id=BOOT)
    text = msgspec.json.encode(header)
    start = (64 + len(text) + 4095) // 4096 * 4096
    size = 72  # 56 and three float32, padded to 8
    data = bytearray((start + capacity * size + 4095) // 4096 * 4096)
    data[:8] = b"SKRYRING"
    struct.pack_into("<II", data, 8, 3, len(text))
    struct.pack_into("<QQqqB", data, 16, len(slots), 0, 0, 0, 0)
    data[64 : 64 + len(text)] = text
    for i, (outcome, flags, rows, total, values) in enumerate(slots):
        struct.pack_into("<BBHIqqqqqQ", data, start + i * size, outcome, flags, i, rows, total, 0, 1, 2, 100 + i, 0)
        struct.pack_into("<3f", data, start + i * size + 56, *values)
    path.write_bytes(data)


OLD = [
    (r.OK, r.VALUES, 1, 50, (0.25, 0.75, 0.25)),
    (r.OK, r.VALUES | r.RETRY, 2, 70, (-0.5, 0.125, 0.875)),
    (r.ROW, r.VALUES | r.RETRY, 0, 0, (3.0, 0.5, 0.5)),
    (r.SHED, 0, 0, 9, (0.0, 0.0, 0.0)),
]


def test_a_ring_of_the_release_before_is_folded_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "1.ring"
    ring_of_version_3(path, OLD)
    cut, recovered = recover(ww.Recover(ring=str(path), start=0), boot_id=BOOT)
    assert (recovered.lost, recovered.damage, recovered.upto) == (0, "", 4)
    assert cut is not None
    window = wire.decode_window(cut.body)
    assert window.counts == w.Counts(ok=2, shed=1, rows=3, retries=1)
    assert window.latency.total == h.exponential_of([50, 70])
    assert window.features["a"].counts == (1, 2)
    assert window.features["a"].moments == h.moments_of(h.quantize(v, 0.0, 1.0) for v in (0.25, -0.5, 3.0))
    assert window.outputs["p"].counts == (2, 1)
    assert (window.tallies, window.freshness) == ({}, h.Exponential())


def test_a_slot_with_a_flag_that_its_version_did_not_have_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "1.ring"
    outcome, flags, rows, total, values = OLD[0]
    ring_of_version_3(path, [(outcome, flags | r.MARKED, rows, total, values), *OLD[1:]])
    cut, recovered = recover(ww.Recover(ring=str(path), start=0), boot_id=BOOT)
    assert recovered.damage == "1 of 4 slots are not of their positions"
    assert cut is not None
    assert wire.decode_window(cut.body).counts.ok == 1


def test_a_version_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "1.ring"
    ring_of_version_3(path, OLD)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, 99)
    path.write_bytes(data)
    with pytest.raises(mapped.Damaged, match="of version 99, wanted 4"):
        r.Ring.open(str(path), boot_id=BOOT)


def test_a_bit_that_a_newer_release_named_is_counted_by_its_number() -> None:
    meta = np.zeros(2, r.META)
    meta["outcome"], meta["flags"], meta["age_ms"] = r.INVALID, r.MARKED, -1
    meta["kinds"] = 1 << 31 | 1
    fold = Fold(Plan())
    fold.add(meta, np.empty((2, 0)))
    moment = w.Instant("", 0, 0, False)
    assert fold.window(KEY, moment, moment, {}).tallies == {w.GUARD_KINDS[0]: 2, "kind.31": 2}
