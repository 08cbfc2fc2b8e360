"""Roll-ups are sums: of everything that counts, once, in any order; and the pre-period is what came before."""

import random

import msgspec
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_server import evidence, rollouts, rollups
from skerry_server.core import rollout as core
from skerry_server.core.plan import read_plan
from skerry_server.db import tables as t
from skerry_server.db.engine import reading


def of_rollout(server, stage=None, rollout="r-1"):
    with reading(server.engine) as connection:
        return {(e.device, e.arm, e.stage): e for e in evidence.of_rollout(connection, rollout, stage)}


def test_sums_and_latency_merge_exactly(server, make):
    chance = random.Random(3)
    values = [[chance.randrange(1, 10**8) for _ in range(20)] for _ in range(12)]
    for i, latencies in enumerate(values):
        server.take(make.up("dev-a", make.record(i + 1, make.window(ok=20, failed=i, latencies=latencies))))
    with reading(server.engine) as connection:
        (found,) = evidence.of_bundle(connection, make.BUNDLE)
        assert evidence.totals_of_devices(connection, ["dev-a", "dev-b"]) == {
            "dev-a": {name: getattr(found, name) for name in evidence.SUMS},
            "dev-b": dict.fromkeys(evidence.SUMS, 0),
        }
    assert (found.windows, found.ok, found.failed, found.rows) == (12, 240, sum(range(12)), 240)
    assert found.latency == h.exponential_of([v for part in values for v in part])


def test_labels_are_counted_from_the_confusion_matrix(server, make):
    # Three classes, [true][predicted]: 2 + 5 + 1 right, 3 + 4 wrong.
    server.take(make.up("dev-a", make.record(1, make.window(confusion=[2, 3, 0, 0, 5, 4, 0, 0, 1]))))
    with reading(server.engine) as connection:
        (found,) = evidence.of_device(connection, "dev-a")
    assert (found.labelled, found.wrong) == (15, 7)


def test_latency_too_coarse_to_be_added_up_is_left_out_and_the_rest_of_its_window_counts(server, make):
    plan = read_plan({"stages": [{"devices": 2}], "gates": {"latency_p95_ms": 50}})
    server.rollout(plan=plan.to_builtins())
    key = {"bundle": make.CANDIDATE, "arm": "candidate", "rollout": "r-1"}
    server.take(make.up("dev-a", make.record(1, make.window(ok=1000, latencies=[500_000_000] * 1000, **key))))
    coarse = (
        h.Exponential(scale=-10, counts=(7,), total=7),
        h.Exponential(scale=-10),
        h.Exponential(scale=2, offset=3, counts=(7,), total=7),
    )
    for seq, latency in enumerate(coarse, 1):
        body = msgspec.structs.replace(make.window(ok=5, **key), latency=w.Latency(total=latency))
        server.take(make.up("dev-b", make.record(seq, body)))
    fine = msgspec.structs.replace(
        make.window(ok=5, **key), latency=w.Latency(total=h.rescale(h.exponential_of([500_000_000] * 9), 3))
    )
    server.take(make.up("dev-b", make.record(4, fine)))
    assert server.counters() == {("dev-b", "latency_unfit"): 3}
    found = of_rollout(server)
    assert (found["dev-b", "candidate", 0].ok, found["dev-b", "candidate", 0].windows) == (20, 4)
    assert found["dev-b", "candidate", 0].latency.scale == 3
    with reading(server.engine) as connection:
        now = rollouts.gather(connection, rollouts.require(connection, "r-1"))
    assert 450 < now.p95_ms < 550
    assert "the gate is 50.00 ms" in core.broken_gate(plan.gates, 0, now)


def test_the_pre_period_of_a_candidate_is_what_it_counted_of_stable(server, make):
    server.rollout()
    server.take(make.up("dev-a", make.record(1, make.window(ok=100, failed=7)), make.record(2, make.window(ok=50))))
    candidate = {"bundle": make.CANDIDATE, "arm": "candidate", "rollout": "r-1"}
    server.take(make.up("dev-a", make.record(3, make.window(ok=5, **candidate))))
    server.take(make.up("dev-a", make.record(4, make.window(ok=6, **candidate))))
    found = of_rollout(server)["dev-a", "candidate", 0]
    assert (found.ok, found.pre_ok, found.pre_failed) == (11, 150, 7)


def test_all_in_one_transaction_gives_the_same_pre_period(server, make):
    server.rollout()
    candidate = {"bundle": make.CANDIDATE, "arm": "candidate", "rollout": "r-1"}
    server.take(
        make.up("dev-a", make.record(1, make.window(ok=100, failed=7)), make.record(2, make.window(ok=50))),
        make.up(
            "dev-a", make.record(3, make.window(ok=5, **candidate)), make.record(4, make.window(ok=6, **candidate))
        ),
    )
    found = of_rollout(server)["dev-a", "candidate", 0]
    assert (found.ok, found.pre_ok, found.pre_failed) == (11, 150, 7)


def test_the_pre_period_of_a_control_is_the_same_bundle_before_the_rollout_in_every_stage(server, make):
    server.rollout()
    server.take(make.up("dev-a", make.record(1, make.window(ok=100))))
    server.take(make.up("dev-a", make.record(2, make.window(ok=9, arm="control", rollout="r-1"))))
    server.take(make.up("dev-a", make.record(3, make.window(ok=8, arm="control", rollout="r-1", stage=1))))
    found = of_rollout(server)
    assert (found["dev-a", "control", 0].ok, found["dev-a", "control", 0].pre_ok) == (9, 100)
    assert (found["dev-a", "control", 1].ok, found["dev-a", "control", 1].pre_ok) == (8, 100)


def test_a_window_of_before_that_comes_late_joins_the_pre_period(server, make):
    server.rollout()
    candidate = {"bundle": make.CANDIDATE, "arm": "candidate", "rollout": "r-1"}
    server.take(make.up("dev-a", make.record(1, make.window(ok=100))))
    server.take(make.up("dev-a", make.record(5, make.window(ok=5, **candidate))))
    # Newest first after an outage: what was counted before the switch arrives after it, in part merged.
    server.take(make.up("dev-a", make.record(4, make.window(ok=20))))
    server.take(make.up("dev-a", make.record(6, make.window(ok=30), replaces=[(2, 3)])))
    # After a revert the device runs stable again: that is no pre-period.
    server.take(make.up("dev-a", make.record(7, make.window(ok=1000))))
    found = of_rollout(server)["dev-a", "candidate", 0]
    assert (found.ok, found.pre_ok) == (5, 150)


def test_devices_and_stages_are_kept_apart(server, make):
    server.rollout()
    for stage in (0, 1):
        for device in ("dev-a", "dev-b"):
            body = make.window(ok=stage + 1, bundle=make.CANDIDATE, arm="candidate", rollout="r-1", stage=stage)
            server.take(make.up(device, make.record(stage + 1, body)))
    assert {key: e.ok for key, e in of_rollout(server, stage=1).items()} == {
        ("dev-a", "candidate", 1): 2,
        ("dev-b", "candidate", 1): 2,
    }
    assert len(of_rollout(server)) == 4


def test_an_unknown_rollout_is_counted_without_a_pre_period(server, make):
    server.take(make.up("dev-a", make.record(1, make.window(ok=100))))
    server.take(make.up("dev-a", make.record(2, make.window(ok=5, arm="control", rollout="made-up"))))
    found = of_rollout(server, rollout="made-up")["dev-a", "control", 0]
    assert (found.ok, found.pre_ok) == (5, 0)


def test_windows_right_after_the_switch_are_not_compared_on_either_arm(server, make):
    server.rollout(plan={"judge": {"guard_s": 30}})
    for device, arm, bundle in (("dev-a", "candidate", make.CANDIDATE), ("dev-b", "control", make.BUNDLE)):
        key = {"bundle": bundle, "arm": arm, "rollout": "r-1"}
        bodies = [
            make.window(ok=20, failed=5, latencies=[9_000_000] * 25, confusion=[1, 2, 3, 4], ms=5_000, **key),
            make.window(ok=20, latencies=[9_000_000] * 20, ms=34_000, **key),
            make.window(ok=20, failed=1, latencies=[1000] * 21, confusion=[5, 0, 1, 5], ms=35_000, **key),
            make.window(ok=20, latencies=[1000] * 20, ms=90_000, **key),
        ]
        for seq, body in enumerate(bodies, 1):
            server.take(make.up(device, make.record(seq, body)))
        found = of_rollout(server)[device, arm, 0]
        assert (found.ok, found.failed, found.labelled) == (80, 6, 21), "the sums hold everything"
        now = found.compared()
        assert (now.ok, now.failed, now.shed, now.labelled, now.wrong) == (40, 1, 0, 11, 1)
        assert now.latency.total == 41_000
        assert h.quantile(now.latency, 0.99) < 2000


def test_what_is_within_the_guard_does_not_depend_on_the_order_of_arrival(server, make):
    key = {"bundle": make.CANDIDATE, "arm": "candidate"}
    spans = [(1, 5_000), (2, 20_000), (3, 33_000), (4, 36_000), (5, 400_000)]
    seen = set()
    for n, order in enumerate([(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 4, 0, 3, 1), (3, 0, 4, 1, 2)]):
        name = f"r-{n}"
        server.rollout(name, plan={"judge": {"guard_s": 30}})
        for i in order:
            seq, ms = spans[i]
            body = make.window(ok=10**i, ms=ms, rollout=name, **key)
            server.take(make.up("dev-a", make.record(seq, body), epoch=f"{n}" * 32))
        seen.add(of_rollout(server, rollout=name)["dev-a", "candidate", 0].compared().ok)
    assert seen == {11000}


def test_another_boot_and_a_long_merged_window_are_compared(server, make):
    server.rollout(plan={"judge": {"guard_s": 30}})
    key = {"bundle": make.CANDIDATE, "arm": "candidate", "rollout": "r-1"}
    first = make.window(ok=1, ms=5_000, **key)
    rebooted = make.window(ok=10, ms=6_000, **key)
    rebooted = msgspec.structs.replace(
        rebooted, start=w.Instant("c" * 32, 1, 6_000, True), end=w.Instant("c" * 32, 2, 6_000, True)
    )
    merged = msgspec.structs.replace(make.window(ok=100, ms=7_000, **key), end=make.at(7_000_000))
    for seq, body in enumerate((first, rebooted, merged), 1):
        server.take(make.up("dev-a", make.record(seq, body)))
    assert of_rollout(server)["dev-a", "candidate", 0].compared().ok == 110


def test_of_many_windows_within_the_guard_the_first_stand_singly_in_any_order(server, make):
    chance = random.Random(5)
    n = 3 * rollups.MOST_EARLY
    key = {"bundle": make.CANDIDATE, "arm": "candidate"}
    seen = set()
    for i in range(4):
        name = f"r-{i}"
        server.rollout(name, plan={"judge": {"guard_s": 30}})
        # Two of each begin at once: what they counted tells them apart.
        bodies = [make.window(ok=1 + k, ms=5_000 + k // 2, rollout=name, latencies=[1000 + k], **key) for k in range(n)]
        records = [make.record(k + 1, body) for k, body in enumerate(bodies)]
        if i:
            chance.shuffle(records)
        step = (200, 97, 13, 150)[i]
        for at in range(0, n, step):
            batch = sorted(records[at : at + step], key=lambda one: one.seq)
            server.take(make.up("dev-a", *batch, epoch=f"{i}" * 32))
        found = of_rollout(server, rollout=name)["dev-a", "candidate", 0]
        assert (len(found.early), found.windows) == (rollups.MOST_EARLY, n)
        assert {one.start_ns for one in found.early} == {(5_000 + k) * 10**6 for k in range(rollups.MOST_EARLY // 2)}
        seen.add(found.compared())
    assert {one.ok for one in seen} == {sum(1 + k for k in range(rollups.MOST_EARLY, n))}
    assert len(seen) == 1, "order of arrival changed what is compared"


def test_a_device_that_floods_the_guard_costs_its_next_window_little(server, make):
    server.rollout(plan={"judge": {"guard_s": 30}})
    body = make.window(ok=1, bundle=make.CANDIDATE, arm="candidate", rollout="r-1", latencies=())
    for at in range(1, 8001, 1000):
        server.take(make.up("dev-a", *(make.record(seq, body) for seq in range(at, at + 1000))))
    (row,) = server.rows(t.evidence)
    assert len(row["early"]) < 100 * rollups.MOST_EARLY
    assert (row["windows"], row["ok"]) == (8000, 8000)


def test_without_a_guard_everything_is_compared(server, make):
    server.rollout()
    body = make.window(ok=7, bundle=make.CANDIDATE, arm="candidate", rollout="r-1")
    server.take(make.up("dev-a", make.record(1, body)))
    found = of_rollout(server)["dev-a", "candidate", 0]
    assert (found.early, found.compared().ok, found.compared().latency) == ((), 7, found.latency)
