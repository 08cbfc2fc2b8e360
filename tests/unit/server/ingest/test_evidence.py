"""Roll-ups are sums: of everything that counts, once, in any order; and the pre-period is what came before."""

import random

from skerry_contract import histogram as h
from skerry_server import evidence
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


def test_the_pre_period_of_a_control_is_the_same_bundle_earlier(server, make):
    server.rollout()
    server.take(make.up("dev-a", make.record(1, make.window(ok=100))))
    server.take(make.up("dev-a", make.record(2, make.window(ok=9, arm="control", rollout="r-1"))))
    server.take(make.up("dev-a", make.record(3, make.window(ok=8, arm="control", rollout="r-1", stage=1))))
    found = of_rollout(server)
    assert (found["dev-a", "control", 0].ok, found["dev-a", "control", 0].pre_ok) == (9, 100)
    assert (found["dev-a", "control", 1].ok, found["dev-a", "control", 1].pre_ok) == (8, 109)


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
