"""The group document, and which device runs what."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import canonical, group, ids
from skerry_contract.errors import Malformed, UnsupportedVersion

from tests.unit.contract import values

VECTORS = json.loads((Path(__file__).parents[2] / "golden" / "v1" / "hash64.json").read_bytes())
OLD = group.Target(digest="a" * 64, version="1.0.0")
NEW = group.Target(digest="b" * 64, version="1.1.0")
PINNED = group.Target(digest="c" * 64, version="0.9.0")
DEVICE = ids.DeviceId("device-1")


def rollout(**changes: object) -> group.Rollout:
    fields = {"id": "r-1", "stage": 0, "candidate": NEW, "salt": "00" * 16, "cuts": {"*": "0"}} | changes
    return group.Rollout(**fields)


def document(**changes: object) -> group.GroupDocument:
    fields = {"schema": 1, "group": "site", "generation": 1, "models": {"gas": group.ModelPlan(stable=OLD)}} | changes
    return group.GroupDocument(**fields)


def in_rollout(**changes: object) -> group.GroupDocument:
    return document(models={"gas": group.ModelPlan(stable=OLD, rollout=rollout(**changes))})


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['salt'][:4]}-{v['id']}"[:20])
def test_published_vectors_of_hash64(vector: dict[str, str]) -> None:
    assert group.hash64(bytes.fromhex(vector["salt"]), vector["id"]) == int(vector["hash64"])


@given(st.binary(min_size=16, max_size=16), values.names)
def test_hash64_is_the_first_eight_bytes_of_sha256(salt: bytes, name: str) -> None:
    assert group.hash64(salt, name).to_bytes(8, "big") == hashlib.sha256(salt + name.encode()).digest()[:8]


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_salt_of_another_length_is_a_bug_of_the_caller(length: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        group.hash64(bytes(length), "a")


def test_outside_a_rollout_everyone_runs_stable() -> None:
    found = group.assign(document(), DEVICE, "gas", "*")
    assert found == group.Assignment(
        model="gas", digest=OLD.digest, version="1.0.0", arm="none", rollout="", stage=0, reason="stable"
    )


def test_a_model_that_the_group_does_not_run_is_nothing() -> None:
    assert group.assign(document(), DEVICE, "other", "*") is None


@given(values.names, st.binary(min_size=16, max_size=16), st.integers(0, group.EVERYONE))
def test_a_device_is_in_when_its_hash_lies_below_the_cut(name: str, salt: bytes, cut: int) -> None:
    found = group.assign(in_rollout(salt=salt.hex(), cuts={"*": str(cut)}, stage=3), ids.DeviceId(name), "gas", "x")
    assert found is not None
    inside = group.hash64(salt, name) < cut
    assert (found.arm, found.digest) == (("candidate", NEW.digest) if inside else ("control", OLD.digest))
    assert (found.rollout, found.stage, found.version) == ("r-1", 3, "1.1.0" if inside else "1.0.0")


@given(st.sets(values.names, max_size=20), st.lists(st.integers(0, group.EVERYONE), min_size=2, max_size=5))
def test_growing_cuts_never_send_a_device_back(names: set[str], cuts: list[int]) -> None:
    before: set[str] = set()
    for cut in sorted(cuts):
        inside = {name for name in names if group.is_candidate(rollout(cuts={"*": str(cut)}), ids.DeviceId(name), "*")}
        assert before <= inside
        before = inside


@given(st.sets(values.names, min_size=1, max_size=30), st.data())
def test_a_cut_above_the_kth_smallest_hash_takes_exactly_k_devices(names: set[str], data: st.DataObject) -> None:
    salt = data.draw(st.binary(min_size=16, max_size=16))
    k = data.draw(st.integers(1, len(names)))
    cut = sorted(group.hash64(salt, name) for name in names)[k - 1] + 1
    plan = rollout(salt=salt.hex(), cuts={"*": str(cut)})
    assert sum(group.is_candidate(plan, ids.DeviceId(name), "*") for name in names) == k


def test_cuts_at_the_ends_take_nobody_and_everybody() -> None:
    highest = next(v for v in VECTORS if v["hash64"] == max((w["hash64"] for w in VECTORS), key=int))
    nobody, everybody = (
        group.is_candidate(rollout(salt=highest["salt"], cuts={"*": cut}), ids.DeviceId(highest["id"]), "*")
        for cut in ("0", str(1 << 64))
    )
    assert not nobody
    assert everybody


@pytest.mark.parametrize(
    ("cuts", "cut"),
    [({"*": "5", "rpi4": "9"}, 9), ({"*": "5"}, 5), ({"x86": "7"}, 0), ({}, 0), ({"rpi4": "0", "*": "5"}, 0)],
)
def test_a_stratum_has_its_own_cut_else_that_of_the_star_else_none(cuts: dict[str, str], cut: int) -> None:
    assert group.cut_for(rollout(cuts=cuts), "rpi4") == cut


def test_a_pin_beats_the_rollout_and_keeps_the_device_out_of_its_evidence() -> None:
    pins = {group.pin_key("site", DEVICE): {"gas": PINNED}}
    plan = group.ModelPlan(stable=OLD, rollout=rollout(cuts={"*": str(group.EVERYONE)}))
    found = group.assign(document(models={"gas": plan}, pins=pins), DEVICE, "gas", "*")
    assert found is not None
    assert (found.digest, found.arm, found.rollout, found.reason) == (PINNED.digest, "none", "", "pin")
    other = group.assign(document(models={"gas": plan}, pins=pins), ids.DeviceId("device-2"), "gas", "*")
    assert other is not None
    assert other.arm == "candidate"


def test_pins_hold_no_plain_device_id_and_differ_between_groups() -> None:
    assert DEVICE not in group.pin_key("site", DEVICE)
    assert group.pin_key("site", DEVICE) != group.pin_key("other", DEVICE)
    # group and device cannot be shifted into each other: neither may hold a colon
    assert group.pin_key("a", ids.DeviceId("b-c")) != group.pin_key("a-b", ids.DeviceId("c"))


@pytest.mark.parametrize("mode", ["shadow", "ab"])
def test_modes_of_later_releases_leave_the_device_on_stable(mode: str) -> None:
    found = group.assign(in_rollout(mode=mode, cuts={"*": str(group.EVERYONE)}), DEVICE, "gas", "*")
    assert found is not None
    assert (found.digest, found.arm) == (OLD.digest, "none")


def test_abilities_that_the_reader_lacks_are_named() -> None:
    assert group.missing_abilities(document(requires=("pins", "teleport", "ab"))) == ("ab", "teleport")
    assert group.missing_abilities(document(requires=("pins", "canary"))) == ()


def test_a_document_is_read_back_and_written_alike() -> None:
    full = document(
        requires=("canary",),
        models={
            "gas": group.ModelPlan(stable=OLD, fallback=PINNED, rollout=rollout(cuts={"*": "7", "rpi4": str(1 << 64)}))
        },
        pins={"0" * 32: {"gas": PINNED}},
        settings=group.Settings(window_s=60.0, networks=("wifi",)),
    )
    data = group.encode(full)
    assert group.parse(data) == full
    assert group.encode(group.parse(data)) == data


def test_fields_of_a_newer_server_do_not_disturb() -> None:
    value = json.loads(group.encode(in_rollout())) | {"zones": {"a": 1}}
    value["models"]["gas"]["rollout"]["weather"] = "fair"
    assert group.parse(canonical.encode(value)) == in_rollout()


def change(path: str, to: object) -> bytes:
    value = json.loads(group.encode(in_rollout()))
    *folders, last = path.split(".")
    at = value
    for folder in folders:
        at = at.setdefault(folder, {})
    if to is None:
        del at[last]
    else:
        at[last] = to
    return canonical.encode(value)


@pytest.mark.parametrize(
    ("path", "to", "named"),
    [
        ("group", "Site", "group"),
        ("group", None, "group"),
        ("generation", 0, r"\$\.generation"),
        ("generation", "1", "generation"),
        ("schema", 0, r"\$\.schema"),
        ("schema", None, "schema"),
        ("models", {"Gas": {"stable": {"digest": "a" * 64, "version": "1.0.0"}}}, "model"),
        ("models.gas.stable", None, "stable"),
        ("models.gas.stable.digest", "a", "bundle digest"),
        ("models.gas.stable.version", "1", "version"),
        ("models.gas.fallback", {"digest": "z" * 64, "version": "1.0.0"}, "bundle digest"),
        ("models.gas.rollout.candidate.digest", "b", "bundle digest"),
        ("models.gas.rollout.id", "", "rollout"),
        ("models.gas.rollout.salt", "00", r"\$\.models\.gas\.rollout\.salt"),
        ("models.gas.rollout.salt", "0G" * 16, r"\$\.models\.gas\.rollout\.salt"),
        ("models.gas.rollout.stage", -1, r"\$\.models\.gas\.rollout\.stage"),
        ("models.gas.rollout.mode", "maybe", "mode"),
        ("models.gas.rollout.cuts", {"*": 5}, "cuts"),
        ("models.gas.rollout.cuts", {"*": "-1"}, r"rollout\.cuts\.\*"),
        ("models.gas.rollout.cuts", {"rpi4": "007"}, r"rollout\.cuts\.rpi4"),
        ("models.gas.rollout.cuts", {"*": str((1 << 64) + 1)}, r"rollout\.cuts"),
        ("models.gas.rollout.cuts", {"*": "9" * 40}, r"rollout\.cuts"),
        ("models.gas.rollout.cuts", {"*": "\u0665"}, r"rollout\.cuts"),
        ("models.gas.rollout.cuts", {"*": ""}, r"rollout\.cuts"),
        ("pins", {"device-1": {"gas": {"digest": "a" * 64, "version": "1.0.0"}}}, r"\$\.pins"),
        ("pins", {"Z" * 32: {}}, r"\$\.pins"),
        ("pins", {"0" * 32: {"gas": {"digest": "a", "version": "1.0.0"}}}, "bundle digest"),
        ("pins", {"0" * 32: {"Gas": {"digest": "a" * 64, "version": "1.0.0"}}}, "model"),
        ("settings.window_s", 0, r"at \$\.settings\.window_s: wanted 0\.1 to 86400, got 0"),
        ("settings.window_s", 86_401, r"at \$\.settings\.window_s: wanted 0\.1 to 86400, got 86401"),
        ("settings.window_s", 1e308, r"at \$\.settings\.window_s: wanted 0\.1 to 86400, got 1e\+308"),
        ("settings.sync_s", 0.5, r"at \$\.settings\.sync_s: wanted 1 to 86400, got 0\.5"),
        ("settings.sync_s", 90_000, r"at \$\.settings\.sync_s: wanted 1 to 86400, got 90000"),
        ("settings.jitter_s", 1e9, r"at \$\.settings\.jitter_s: wanted 0 to 86400, got 1000000000"),
        ("settings.trial_s", 1e6, r"at \$\.settings\.trial_s: wanted 0\.1 to 604800, got 1000000"),
        ("settings.trial_inferences", -1, r"at \$\.settings\.trial_inferences: wanted 0 to 10000000, got -1"),
        ("settings.trial_inferences", 10**9, r"at \$\.settings\.trial_inferences: wanted 0 to 10000000"),
        ("settings.max_kib_s", 1 << 30, r"at \$\.settings\.max_kib_s: wanted 0 to 10485760, got 1073741824"),
        ("settings.networks", ["n"] * 65, r"at \$\.settings\.networks: wanted at most 64 names, got 65"),
        ("settings.networks", ["wifi", ""], r"at \$\.settings\.networks\[1\]: wanted 1 to 63 characters, got 0"),
        ("settings.networks", ["x" * 64], r"at \$\.settings\.networks\[0\]: wanted 1 to 63 characters, got 64"),
        ("settings.sync_s", -1, r"\$\.settings"),
        ("settings.trial_s", 0, r"\$\.settings"),
        ("settings.jitter_s", -0.5, r"\$\.settings"),
        ("settings.sample_rate", 1.5, r"\$\.settings"),
        ("settings.max_kib_s", -1, r"\$\.settings"),
    ],
)
def test_a_broken_rule_is_refused_and_named(path: str, to: object, named: str) -> None:
    with pytest.raises(Malformed, match=named):
        group.parse(change(path, to))


@pytest.mark.parametrize("end", [0, 1])
def test_the_bounds_of_every_setting_are_allowed(end: int) -> None:
    values = {name: bounds[end] for name, bounds in group.BOUNDS.items()}
    full = document(settings=group.Settings(**values, networks=("x" * 63,) * 64))  # type: ignore[arg-type]
    assert group.parse(group.encode(full)) == full


def test_every_number_among_the_settings_has_bounds() -> None:
    numbers = {
        name for name in group.Settings.__struct_fields__ if isinstance(getattr(group.Settings(), name), int | float)
    }
    assert numbers == set(group.BOUNDS)
    for name, (low, high) in group.BOUNDS.items():
        assert low <= getattr(group.Settings(), name) <= high


def test_a_newer_schema_is_told_from_a_broken_one() -> None:
    with pytest.raises(UnsupportedVersion, match="schema 2 is newer than 1"):
        group.parse(change("schema", 2))


def test_what_a_reader_refuses_is_not_written() -> None:
    with pytest.raises(Malformed):
        group.encode(document(generation=0))
