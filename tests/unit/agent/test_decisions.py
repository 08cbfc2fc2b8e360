"""Admission, plan, trial and backoff: values in, values out."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_agent.core import admission as a
from skerry_agent.core import backoff, culprits, lifecycle, liveness, recent, trial
from skerry_agent.core import plan as p
from skerry_contract import group, ids
from skerry_contract import manifest as m
from skerry_runtime import engines
from skerry_runtime.errors import BundleFault

GOOD = a.Device(
    runtimes={"onnx": "1.20.1"}, arch="x86_64", memory_free_mb=500, disk_free_mb=500, agent="0.1.0",
    abilities=frozenset({"canary"}),
)  # fmt: skip
D1, D2, D3 = "1" * 64, "2" * 64, "3" * 64


def variant(name: str = "v", **changes: object) -> m.Variant:
    fields: dict[str, object] = {
        "id": name, "runtime": "onnx", "model": "model.onnx", "golden": m.Golden(cases="golden.jsonl"),
        "files": (m.File(path="model.onnx", sha256="0" * 64, size=2_000_000), m.File(path="golden.jsonl", sha256="0" * 64, size=10)),
        "needs": m.Needs(rss_mb=50, disk_mb=5),
    }  # fmt: skip
    return m.Variant(**{**fields, **changes})  # type: ignore[arg-type]


def manifest(*variants: m.Variant, **changes: object) -> m.Manifest:
    fields: dict[str, object] = {
        "schema": 1, "model": "gas", "version": "1.2.0", "created": "2026-01-01T00:00:00Z", "owner": m.Owner(name="n", contact="c"),
        "licence": "MIT", "variants": variants or (variant(),), "inputs": (), "outputs": (), "reference": m.Reference(n=0),
    }  # fmt: skip
    return m.Manifest(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_bundle_that_fits_is_admitted_with_what_is_still_to_fetch() -> None:
    assert a.admit(manifest(), GOOD, a.Memory(present_bytes=500_010)) == a.Admit(variant="v", fetch_bytes=1_500_000)


@pytest.mark.parametrize(
    ("code", "found", "device", "memory"),
    [
        ("attempts_exhausted", manifest(), GOOD, a.Memory(failures={"golden_failed": 1})),
        ("agent_too_old", manifest(min_agent="0.2.0"), GOOD, a.Memory()),
        ("agent_too_old", manifest(requires=("teleport",)), GOOD, a.Memory()),
        ("below_floor", manifest(), GOOD, a.Memory(floor="1.3.0")),
        ("must_pass_first", manifest(after="1.1.0"), GOOD, a.Memory(confirmed="1.0.9")),
        ("no_variant", manifest(variant(arch=("aarch64",))), GOOD, a.Memory()),
        ("runtime_missing", manifest(variant(runtime="tflite")), GOOD, a.Memory()),
        ("runtime_missing", manifest(variant(min="1.21")), GOOD, a.Memory()),
        ("runtime_missing", manifest(), dataclasses.replace(GOOD, runtimes={"tflite": "2.14"}, prefer=("tflite",)), a.Memory()),
        ("not_enough_memory", manifest(), dataclasses.replace(GOOD, memory_free_mb=49), a.Memory()),
        ("not_enough_memory", manifest(), dataclasses.replace(GOOD, memory_reserve_mb=460), a.Memory()),
        ("not_enough_disk", manifest(), dataclasses.replace(GOOD, disk_free_mb=4.9), a.Memory()),
    ],
)  # fmt: skip
def test_a_bundle_that_does_not_fit_is_refused_with_its_code(
    code: str, found: m.Manifest, device: a.Device, memory: a.Memory
) -> None:
    answer = a.admit(found, device, memory)
    assert isinstance(answer, a.Refuse)
    assert answer.code == code
    assert answer.detail


@pytest.mark.parametrize("confirmed", ["", "1.1.0", "1.1.1", "2.0.0"])
def test_what_goes_after_a_version_is_admitted_where_that_was_passed_or_nothing_is_to_carry_over(
    confirmed: str,
) -> None:
    assert isinstance(a.admit(manifest(after="1.1.0"), GOOD, a.Memory(confirmed=confirmed)), a.Admit)


BOTH = dataclasses.replace(GOOD, runtimes={"onnx": "1.20.1", "tflite": "2.14"})


@pytest.mark.parametrize(
    ("prefer", "wins"),
    [((), "a"), (("onnx",), "a"), (("tflite",), "b"), (("tflite", "onnx"), "b"), (("onnx", "tflite"), "a")],
)
def test_the_devices_preferred_runtime_beats_the_order_of_the_manifest(prefer: tuple[str, ...], wins: str) -> None:
    found = manifest(variant("a"), variant("b", runtime="tflite"))
    answer = a.admit(found, dataclasses.replace(BOTH, prefer=prefer), a.Memory())
    assert isinstance(answer, a.Admit)
    assert answer.variant == wins


def test_an_encrypted_bundle_wants_memory_to_be_opened_in_as_well() -> None:
    size = 30_000_000
    files = tuple(
        m.File(path=path, sha256="0" * 64, size=size + 99, plain=m.Plain(sha256="1" * 64, size=size))
        for path in ("model.onnx", "golden.jsonl")
    )
    found = manifest(variant(files=files))
    refusal = a.admit(found, dataclasses.replace(GOOD, memory_free_mb=109), a.Memory())
    assert isinstance(refusal, a.Refuse)
    assert (refusal.code, refusal.detail) == (
        "not_enough_memory", "v wants 50 MB and 60.0 MB to be opened in, 109 MB are free",
    )  # fmt: skip
    assert isinstance(a.admit(found, dataclasses.replace(GOOD, memory_free_mb=110), a.Memory()), a.Admit)


def test_a_preferred_variant_that_does_not_fit_leaves_the_place_to_the_next() -> None:
    big = variant("b", runtime="tflite", needs=m.Needs(rss_mb=900, disk_mb=1))
    answer = a.admit(manifest(variant("a"), big), dataclasses.replace(BOTH, prefer=("tflite", "onnx")), a.Memory())
    assert isinstance(answer, a.Admit)
    assert answer.variant == "a"


def test_a_runtime_that_is_left_out_is_told_from_one_that_is_not_installed() -> None:
    left_out = a.admit(
        manifest(), dataclasses.replace(GOOD, runtimes={"tflite": "2.14"}, prefer=("tflite",)), a.Memory()
    )
    missing = a.admit(manifest(variant(runtime="tflite")), dataclasses.replace(GOOD, prefer=("tflite",)), a.Memory())
    broken = a.admit(
        manifest(variant(runtime="tflite")), dataclasses.replace(GOOD, broken=frozenset({"tflite"})), a.Memory()
    )
    assert isinstance(left_out, a.Refuse)
    assert isinstance(missing, a.Refuse)
    assert isinstance(broken, a.Refuse)
    assert "does not work here" in broken.detail
    assert "device.runtimes leaves out" in left_out.detail
    assert "is not installed" in missing.detail


def test_the_first_variant_that_fits_wins_and_the_nearest_refusal_is_told() -> None:
    arm, big, small = (
        variant("arm", arch=("aarch64",)),
        variant("big", needs=m.Needs(rss_mb=900, disk_mb=1)),
        variant("small"),
    )
    assert a.admit(manifest(arm, big, small), GOOD, a.Memory()) == a.Admit(variant="small", fetch_bytes=2_000_010)
    refusal = a.admit(manifest(arm, big), GOOD, a.Memory())
    assert isinstance(refusal, a.Refuse)
    assert refusal.code == "not_enough_memory"


@pytest.mark.parametrize(
    ("have", "want", "fits"),
    [
        ("1.17", "1.17.0", True),
        ("1.9.1", "1.17", False),
        ("1.17.0rc1", "1.17", True),
        ("2.0", "1.99", True),
        ("1.16.9+cpu", "1.17", False),
        ("0", "1.17", True),
        ("1.32", "1.32.0", True),
        ("2", "2.0", True),
        ("2.3.0", "2.3.0.0", True),
        ("2.3.0", "2.3.0.1", False),
        ("1.2.3.4.5", "1.2.3.4.6", False),
        ("1.17rc1", "1.17.0", True),
    ],
)
def test_admission_and_the_engine_compare_versions_of_a_runtime_alike(
    have: str, want: str, fits: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = a.admit(manifest(variant(min=want)), dataclasses.replace(GOOD, runtimes={"onnx": have}), a.Memory())
    assert isinstance(answer, a.Admit) is fits
    # The same module as of that version in front of the installed one; the engine's next complaint is of the file.
    installed = importlib.util.find_spec("onnxruntime")
    assert installed is not None
    assert installed.origin is not None
    (tmp_path / "onnxruntime").symlink_to(Path(installed.origin).parent)
    folder = tmp_path / f"onnxruntime-{have}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: onnxruntime\nVersion: {have}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    assert engines.available()["onnx"] == have
    with pytest.raises(BundleFault) as fault:
        engines.load_engine("onnx", tmp_path / "none.onnx", minimum=want)
    assert (fault.value.code != "runtime_missing") is fits


def test_codes_that_speak_of_the_network_never_exhaust() -> None:
    assert a.exhausted({"unreachable": 1000, "timeout": 1000, "not_enough_disk": 50}) is None
    assert a.exhausted({"hash_mismatch": 2}) is None
    assert a.exhausted({"hash_mismatch": 3}) == "hash_mismatch"


# --- plan ------------------------------------------------------------------------------------------------------------

DEVICE = ids.device_id("d-1")


def document(
    *, cut: int | None = None, stage: int = 0, fallback: str = "", opens_at: int = 0, **fields: object
) -> group.GroupDocument:
    rollout = None
    if cut is not None:
        rollout = group.Rollout(
            id="r", stage=stage, candidate=group.Target(digest=D2, version="2.0.0"), salt="0" * 32, cuts={"*": str(cut)},
            opens_at=opens_at,
        )  # fmt: skip
    found = group.ModelPlan(
        stable=group.Target(digest=D1, version="1.0.0"), rollout=rollout,
        fallback=group.Target(digest=D3, version="0.9.0") if fallback else None,
    )  # fmt: skip
    return group.GroupDocument(schema=1, group="g", generation=1, models={"gas": found}, **fields)  # type: ignore[arg-type]


def one(doc: group.GroupDocument, running: p.Running | None, refused: set[str] | None = None) -> p.Step:
    (step,) = p.plan(doc, DEVICE, "x", {"gas": running} if running else {}, refused or set())
    return step


@pytest.mark.parametrize(
    ("confirmed", "refused", "goes_to"),
    [("1.0.0", set(), D3), ("1.5.0", set(), D2), ("", set(), D2), ("3.0.0", set(), D2), ("1.0.0", {D3}, D2)],
)
def test_a_version_on_the_way_is_confirmed_first(confirmed: str, refused: set[str], goes_to: str) -> None:
    target = group.Target(digest=D2, version="2.0.0")
    found = group.ModelPlan(stable=target, via=(group.Target(digest=D3, version="1.5.0"),))
    doc = group.GroupDocument(schema=1, group="g", generation=1, models={"gas": found})
    step = one(doc, p.Running(digest=D1, confirmed=confirmed), refused)
    assert isinstance(step, p.Change)
    assert step.digest == goes_to
    # On trial it stays what the device runs.
    if goes_to == D3:
        assert one(doc, p.Running(digest=D3, confirmed="1.0.0")) == p.Keep(model="gas", why="as_assigned")


def test_nothing_running_takes_what_is_assigned() -> None:
    assert one(document(), None) == p.Change(model="gas", digest=D1, version="1.0.0", arm="none", rollout="", stage=0)


def test_the_same_bundle_under_another_stage_is_rekeyed_not_updated() -> None:
    control = p.Running(digest=D1, arm="control", rollout="r", stage=0)
    assert one(document(cut=0, stage=1), control) == p.Rekey(model="gas", arm="control", rollout="r", stage=1)
    assert one(document(cut=0), control) == p.Keep(model="gas", why="as_assigned")
    assert one(document(), control) == p.Rekey(model="gas", arm="none", rollout="", stage=0)


def test_a_refused_candidate_leaves_the_experiment_and_keeps_stable() -> None:
    doc = document(cut=group.EVERYONE)
    control = p.Running(digest=D1, arm="control", rollout="r", stage=0)
    assert one(doc, control, {D2}) == p.Rekey(model="gas", arm="none", rollout="", stage=0)
    assert one(doc, p.Running(digest=D1), {D2}) == p.Keep(model="gas", why="as_assigned")
    assert one(doc, None, {D2}) == p.Change(model="gas", digest=D1, version="1.0.0", arm="none", rollout="", stage=0)


def test_a_device_that_can_run_neither_takes_the_fallback() -> None:
    doc = document(cut=group.EVERYONE, fallback=D3)
    assert one(doc, None, {D1, D2}) == p.Change(
        model="gas", digest=D3, version="0.9.0", arm="none", rollout="", stage=0
    )
    assert one(document(), None, {D1}) == p.Keep(model="gas", why="refused")


def test_an_agent_that_lacks_an_ability_keeps_everything() -> None:
    assert one(document(requires=("teleport",)), p.Running(digest=D3)) == p.Keep(model="gas", why="agent_too_old")


def test_a_model_that_is_no_longer_named_keeps_serving() -> None:
    doc = group.GroupDocument(schema=1, group="g", generation=1)
    assert one(doc, p.Running(digest=D1)) == p.Keep(model="gas", why="not_assigned")


def test_a_candidate_is_fetched_before_its_rollout_opens() -> None:
    assert isinstance(one(document(cut=group.EVERYONE, opens_at=1 << 40), p.Running(digest=D1)), p.Change)


@given(
    st.sampled_from([D1, D2, D3, ""]),
    st.sets(st.sampled_from([D1, D2, D3])),
    st.sampled_from([None, 0, group.EVERYONE]),
)
def test_a_plan_never_asks_for_a_refused_bundle_and_settles(digest: str, refused: set[str], cut: int | None) -> None:
    doc = document(cut=cut, fallback=D3)
    running = p.Running(digest=digest) if digest else None
    for _ in range(3):
        step = one(doc, running, refused)
        if isinstance(step, p.Change):
            assert step.digest not in refused
            running = p.Running(digest=step.digest, arm=step.arm, rollout=step.rollout, stage=step.stage)
        elif isinstance(step, p.Rekey):
            assert running is not None
            running = p.Running(digest=running.digest, arm=step.arm, rollout=step.rollout, stage=step.stage)
    assert isinstance(one(doc, running, refused), p.Keep)


# --- trial -----------------------------------------------------------------------------------------------------------

RULES = trial.Trial(inferences=100, duration_s=60.0)
counts = st.builds(
    trial.Counts,
    ok=st.integers(0, 5000), invalid=st.integers(0, 500), failed=st.integers(0, 500), shed=st.integers(0, 10),
    p95_ms=st.none() | st.floats(0.01, 1000),
)  # fmt: skip


def test_a_trial_without_a_request_is_no_success_whatever_the_settings_want() -> None:
    rules = trial.Trial(inferences=0, duration_s=60.0)
    assert trial.judge_trial(rules, trial.Counts(), None, 5).answer == "wait"
    assert trial.judge_trial(rules, trial.Counts(), None, 60).answer == "quiet"
    assert trial.judge_trial(rules, trial.Counts(ok=1), None, 5).answer == "keep"


def test_what_little_was_seen_of_the_old_generation_is_no_excuse_for_the_new_one() -> None:
    # One request, answered: as if of thirty none had failed.
    assert trial.judge_trial(RULES, trial.Counts(ok=70, failed=20), trial.Counts(ok=1), 5).code == "trial_errors"
    assert trial.judge_trial(RULES, trial.Counts(ok=70, failed=20), trial.Counts(ok=29), 5).code == "trial_errors"
    # A past as bad as this says that it is not the bundle.
    assert trial.judge_trial(RULES, trial.Counts(ok=70, failed=20), trial.Counts(ok=15, failed=5), 5).answer == "wait"


def test_the_old_generation_is_known_by_what_it_did_of_late() -> None:
    bounds, old = (1.0, 10.0, 100.0), recent.Recent()
    # An hour of failures and of answers in 50 ms, then an hour in order and fast.
    for minute in range(120):
        bad = min(minute, 60)
        fast = max(0, minute - 60)
        counts = trial.Counts(
            ok=100 * minute, failed=100 * bad, p95_ms=50.0, latency=(100 * fast, 100 * fast, 100 * minute)
        )
        old.hear(60.0 * minute, counts)
    of_late = old.of_late(60.0 * 119, counts, bounds)
    assert (of_late.ok, of_late.failed, of_late.p95_ms) == (1000, 0, 1.0)
    assert trial.judge_trial(RULES, trial.Counts(ok=80, failed=20), of_late, 5).code == "trial_errors"
    assert trial.judge_trial(RULES, trial.Counts(ok=80, failed=20), counts, 5).answer == "keep"
    assert trial.judge_trial(RULES, trial.Counts(ok=100, p95_ms=15.0), of_late, 5).code == "trial_slow"


def test_a_young_generation_is_known_by_its_whole_life() -> None:
    old, counts = recent.Recent(), trial.Counts(ok=50, failed=1, p95_ms=2.0, latency=(50,))
    old.hear(0.0, trial.Counts())
    old.hear(20.0, counts)
    assert old.of_late(21.0, counts, (5.0,)) == counts
    # Nothing of late is no evidence, and not the counts of long ago.
    assert old.of_late(10_000.0, counts, (5.0,)).ok == 0


def test_a_good_trial_waits_for_traffic_and_is_kept() -> None:
    old = trial.Counts(ok=1000, p95_ms=2.0)
    assert trial.judge_trial(RULES, trial.Counts(ok=99, p95_ms=2.0), old, 5).answer == "wait"
    assert trial.judge_trial(RULES, trial.Counts(ok=100, p95_ms=2.0), old, 5).answer == "keep"
    assert trial.judge_trial(RULES, trial.Counts(ok=3), old, 60).answer == "quiet"
    assert trial.judge_trial(RULES, trial.Counts(), None, 60).answer == "quiet"


def test_silence_confirms_nothing_and_excuses_nothing() -> None:
    old = trial.Counts(ok=1000, p95_ms=2.0)
    assert trial.judge_trial(RULES, trial.Counts(ok=100, p95_ms=2.0), old, 5, current=False).answer == "wait"
    assert trial.judge_trial(RULES, trial.Counts(), old, 10_000, current=False).answer == "wait"
    assert trial.judge_trial(RULES, trial.Counts(failed=3), old, 1, current=False).code == "trial_errors"


def test_a_worker_hangs_when_it_is_silent_or_stuck_for_longer_than_the_slowest_healthy_one() -> None:
    limits = liveness.Limits(silent_s=10, inference_s=60, interval_s=2)
    for life in (
        liveness.Life(silent_s=10),
        liveness.Life(silent_s=0, busy_s=60),
        # A model that was slow in its proof may be slow.
        liveness.Life(silent_s=0, busy_s=299, expected_s=30),
    ):
        assert liveness.judge_liveness(life, limits) == ""
    assert "no report for 10.5 s" in liveness.judge_liveness(liveness.Life(silent_s=10.5), limits)
    assert "61.0 s" in liveness.judge_liveness(liveness.Life(silent_s=0, busy_s=61), limits)
    rare = liveness.Limits(silent_s=10, inference_s=60, interval_s=30)
    assert liveness.judge_liveness(liveness.Life(silent_s=149), rare) == ""
    assert liveness.judge_liveness(liveness.Life(silent_s=151), rare)


def test_a_worker_leaks_when_it_has_more_than_its_models_need_and_more_than_it_began_with() -> None:
    def judged(own_mb: float) -> liveness.Unruly | None:
        most_mb = liveness.allowed_mb(base_mb=20, ready_mb=50, needs_mb=100, slack_mb=30)
        use = liveness.Use(at_s=1, own_mb=own_mb)
        return liveness.judge_use(use, use, most_mb=most_mb, longest_s=30)

    assert judged(150) is None
    leaked = judged(151)
    assert leaked is not None and (leaked.code, leaked.now) == ("worker_leaked", False)
    far = judged(226)
    assert far is not None and far.now
    # It declares less than it had from the beginning.
    assert liveness.allowed_mb(base_mb=20, ready_mb=500, needs_mb=1, slack_mb=30) == 530


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(0, 1), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_a_worker_spins_only_by_processor_time_without_work(steps: list[tuple[float, float, bool, bool]]) -> None:
    now = liveness.Use(at_s=0.0)
    since: liveness.Use | None = None
    for passed_s, share, works, idle in steps:
        now = liveness.Use(
            at_s=now.at_s + passed_s, cpu_s=now.cpu_s + share * passed_s, work=now.work + works, idle=idle
        )
        since = liveness.spins_since(since, now)
        if works or not idle:
            assert since == now
        if now.at_s > since.at_s:
            assert (now.cpu_s - since.cpu_s) / (now.at_s - since.at_s) >= liveness.SPINNING_SHARE
    assert since is not None
    found = liveness.judge_use(now, since, most_mb=1.0, longest_s=10)
    assert (found is not None) == (now.at_s - since.at_s >= 10)


def test_a_worker_that_uses_a_core_without_a_request_spins_and_one_in_use_does_not() -> None:
    def last(*reports: liveness.Use) -> float:
        since: liveness.Use | None = None
        for report in reports:
            since = liveness.spins_since(since, report)
        assert since is not None
        return reports[-1].at_s - since.at_s

    spinning = [liveness.Use(at_s=at, cpu_s=0.9 * at, work=7) for at in range(0, 31, 2)]
    assert last(*spinning) == 30
    assert last(*(dataclasses.replace(one, work=i) for i, one in enumerate(spinning))) == 0
    assert last(*(dataclasses.replace(one, idle=False) for one in spinning)) == 0
    assert last(*(dataclasses.replace(one, cpu_s=0.1 * one.at_s) for one in spinning)) == 0
    # A request came in between: it counts from there.
    assert last(*spinning[:10], *(dataclasses.replace(one, work=8) for one in spinning[10:])) == 10


GAS, PUMP = ("gas", D1), ("pump", D2)


def test_a_model_is_the_culprit_once_it_was_in_work_at_enough_deaths_of_late() -> None:
    crashes = [culprits.Crash(at_s=100.0 + i, suspects=(PUMP,)) for i in range(lifecycle.CRASHES)]
    assert culprits.culprit(crashes[1:], 110) is None
    assert culprits.culprit(crashes, 110) == PUMP
    # The oldest does not count any more.
    assert culprits.culprit(crashes, 101 + lifecycle.CRASHES_WITHIN_S) is None
    # Nobody was in work, or somebody else.
    assert (
        culprits.culprit([*crashes[1:], culprits.Crash(at_s=109), culprits.Crash(at_s=109, suspects=(GAS,))], 110)
        is None
    )


@given(st.lists(st.lists(st.sampled_from([GAS, PUMP]), unique=True, max_size=2), max_size=12))
def test_the_culprit_was_a_suspect_as_often_as_any_other_and_often_enough(
    suspects: list[list[tuple[str, str]]],
) -> None:
    crashes = [culprits.Crash(at_s=0, suspects=tuple(found)) for found in suspects]
    found = culprits.culprit(crashes, 0)
    charges = {one: sum(one in mine for mine in suspects) for one in (GAS, PUMP)}
    assert (found is not None) == (max(charges.values()) >= lifecycle.CRASHES)
    assert found is None or charges[found] == max(charges.values())


def test_an_old_report_or_an_overdue_inference_does_not_speak_for_now() -> None:
    limits = liveness.Limits(silent_s=10, inference_s=60, interval_s=2)
    assert liveness.speaks_for_now(liveness.Life(silent_s=4), limits)
    assert liveness.speaks_for_now(liveness.Life(silent_s=0, busy_s=8, expected_s=1), limits)
    assert not liveness.speaks_for_now(liveness.Life(silent_s=6), limits)
    assert not liveness.speaks_for_now(liveness.Life(silent_s=0, busy_s=2, expected_s=0.01), limits)


def test_a_runtime_that_fails_every_request_goes_back_at_once() -> None:
    verdict = trial.judge_trial(RULES, trial.Counts(failed=3), trial.Counts(ok=1000), 1)
    assert (verdict.answer, verdict.code) == ("revert", "trial_errors")


def test_errors_that_the_old_version_made_as_well_are_not_held_against_the_new() -> None:
    old = trial.Counts(ok=800, failed=200)
    assert trial.judge_trial(RULES, trial.Counts(ok=78, failed=22), old, 5).answer == "keep"
    assert trial.judge_trial(RULES, trial.Counts(ok=40, failed=60), old, 5).code == "trial_errors"


def test_requests_that_suddenly_are_invalid_go_back() -> None:
    old = trial.Counts(ok=1000)
    assert trial.judge_trial(RULES, trial.Counts(invalid=20), old, 5).code == "trial_errors"
    assert trial.judge_trial(RULES, trial.Counts(invalid=20), None, 5).answer == "wait"


def test_requests_that_are_invalid_are_no_evidence_for_a_bundle_after_one_that_was_not_asked_of_late() -> None:
    quiet = trial.Counts()
    assert trial.judge_trial(RULES, trial.Counts(invalid=500), quiet, 61).code == "trial_errors"
    assert trial.judge_trial(RULES, trial.Counts(ok=120, invalid=5000), quiet, 5).code == "trial_errors"
    # A few of them are taken for granted.
    assert trial.judge_trial(RULES, trial.Counts(ok=120, invalid=12), quiet, 5).answer == "keep"


def test_a_version_far_slower_than_the_old_one_goes_back() -> None:
    old = trial.Counts(ok=1000, p95_ms=5.0)
    assert trial.judge_trial(RULES, trial.Counts(ok=100, p95_ms=31.0), old, 5).code == "trial_slow"
    assert trial.judge_trial(RULES, trial.Counts(ok=100, p95_ms=29.0), old, 5).answer == "keep"


def test_the_bundles_own_limit_counts_unless_the_device_missed_it_before() -> None:
    rules = dataclasses.replace(RULES, limit_ms=8.0)
    slow = trial.Counts(ok=100, p95_ms=9.0)
    assert trial.judge_trial(rules, slow, trial.Counts(ok=1000, p95_ms=5.0), 5).code == "trial_slow"
    assert trial.judge_trial(rules, slow, trial.Counts(ok=1000, p95_ms=9.0), 5).answer == "keep"


@given(counts, st.none() | counts, st.floats(0, 200))
def test_a_verdict_is_always_one_and_always_has_its_reason(
    new: trial.Counts, old: trial.Counts | None, elapsed: float
) -> None:
    verdict = trial.judge_trial(RULES, new, old, elapsed)
    assert bool(verdict.code) == (verdict.answer == "revert")
    assert verdict.detail
    if elapsed >= RULES.duration_s:
        assert verdict.answer != "wait"
    assert trial.judge_trial(RULES, new, old, elapsed, crashed=True).code == "trial_crashed"


@given(st.integers(0, 2), st.integers(0, 5000))
def test_up_to_two_failures_never_send_a_version_back(failed: int, ok: int) -> None:
    assert trial.judge_trial(RULES, trial.Counts(ok=ok, failed=failed), trial.Counts(ok=1000), 5).answer in (
        "keep",
        "wait",
    )


# --- backoff ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(backoff.POLICIES)), st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_a_wait_stays_between_floor_and_cap(cause: str, failures: int, draw: float) -> None:
    policy = backoff.POLICIES[cause]
    assert policy.floor_s <= backoff.delay_s(cause, failures, draw) <= policy.cap_s


def test_the_wait_grows_with_failures_and_spreads_with_the_draw() -> None:
    waits = [backoff.delay_s("sync", n, 0.999) for n in range(1, 8)]
    assert waits == sorted(waits)
    assert backoff.delay_s("sync", 8, 0.1) < backoff.delay_s("sync", 8, 0.9) / 5


@pytest.mark.parametrize(("failures", "draw"), [(0, 0.5), (1, 1.0), (1, -0.1)])
def test_a_wait_out_of_range_is_a_bug_that_shows(failures: int, draw: float) -> None:
    with pytest.raises(ValueError, match="wanted"):
        backoff.delay_s("sync", failures, draw)


def test_what_is_here_already_needs_no_room_on_a_disk_that_others_filled() -> None:
    full = dataclasses.replace(GOOD, disk_free_mb=0.1, disk_reserve_mb=64, files_free=0, file_reserve=256)
    wanted = manifest()
    size = sum(file.size for file in wanted.variants[0].files)
    assert isinstance(a.admit(wanted, full, a.Memory(present_bytes=size)), a.Admit)
    assert getattr(a.admit(wanted, full, a.Memory()), "code", "") == "not_enough_disk"


def test_what_came_in_part_is_off_what_is_wanted_as_it_is_off_the_free_room() -> None:
    wanted, size = manifest(), 2_000_010
    for here in range(0, size, 100_000):
        left = dataclasses.replace(GOOD, disk_free_mb=(5_000_000 - here) / 1e6)
        assert isinstance(a.admit(wanted, left, a.Memory(present_bytes=here)), a.Admit)
        less = dataclasses.replace(left, disk_free_mb=left.disk_free_mb - 0.001)
        assert getattr(a.admit(wanted, less, a.Memory(present_bytes=here)), "code", "") == "not_enough_disk"
        assert isinstance(a.admit(wanted, less, a.Memory(present_bytes=here, idle_bytes=1000)), a.Admit)


def test_a_disk_without_names_for_files_refuses_before_anything_is_fetched() -> None:
    for files_free, refused in ((264, True), (1000, False)):
        answer = a.admit(manifest(), dataclasses.replace(GOOD, files_free=files_free, file_reserve=256), a.Memory())
        assert (getattr(answer, "code", "") == "not_enough_disk") is refused


def test_a_fleet_comes_spread_over_the_jitter_and_each_device_at_its_own_time() -> None:
    places = sorted(backoff.spread(f"d-{i}", 3) for i in range(2_000))
    assert places[0] >= 0
    assert places[-1] < 1
    assert max(abs(place - i / 2_000) for i, place in enumerate(places)) < 0.05
    # Whoever comes late for one version does not for all.
    assert len({int(backoff.spread("d-1", version) * 10) for version in range(100)}) == 10
