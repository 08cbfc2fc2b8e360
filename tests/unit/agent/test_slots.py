"""Bundles on disk: whatever is cut short, one runnable version remains."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from skerry_agent.courier import shared
from skerry_agent.errors import Rejected
from skerry_agent.slots import PARTS, STAGED_MANIFEST, Slot, Slots
from skerry_contract import manifest as m

from tests import models


def put(slots: Slots, folder: Path, version: str) -> Slot:
    """Builds a bundle and leaves it in staging, as a courier does."""
    digest = models.build_bundle(folder / version, version=version)
    shutil.copytree(folder / version, slots.staging_path(digest))
    manifest = m.parse((folder / version / "manifest.json").read_bytes())
    return Slot(digest=digest, version=version, variant=manifest.variants[0].id, standing="confirmed")


def files(slots: Slots, slot: Slot) -> tuple[m.File, ...]:
    folder = slots.staging_path(slot.digest) if slots.staging_path(slot.digest).exists() else slots.path(slot.digest)
    return m.parse((folder / "manifest.json").read_bytes()).files()


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path / "slots")


def confirmed(slots: Slots, tmp_path: Path, version: str) -> Slot:
    slot = put(slots, tmp_path, version)
    slots.verify(slot.digest, files(slots, slot))
    slots.stage(slot.digest)
    slots.confirm("gas", slot)
    return slot


def test_a_staged_bundle_becomes_a_slot_and_staging_is_empty(slots: Slots, tmp_path: Path) -> None:
    slot = confirmed(slots, tmp_path, "1.0.0")
    assert slots.digests() == (slot.digest,)
    assert list(slots.staging.iterdir()) == []
    assert slots.whole(slot.digest, slot.variant)
    slots.stage(slot.digest)
    assert Slots(slots.root).boot() == ({"gas": slot}, [])


def put_variant(slots: Slots, folder: Path, name: str) -> Slot:
    """Leaves one of the two variants of a bundle in staging: each has the model under a name of its own."""
    models.build_bundle(folder / "1.0.0", version="1.0.0")
    found = m.parse((folder / "1.0.0" / "manifest.json").read_bytes())
    (plain,) = found.variants
    others = []
    for variant in ("a", "b"):
        renamed = tuple(
            msgspec.structs.replace(f, path=f"{variant}.onnx") if f.path == plain.model else f for f in plain.files
        )
        others.append(msgspec.structs.replace(plain, id=variant, model=f"{variant}.onnx", files=renamed))
    text = m.encode(msgspec.structs.replace(found, variants=tuple(others)))
    staging = slots.staging_path(m.digest(text))
    shutil.copytree(folder / "1.0.0", staging)
    (staging / plain.model).rename(staging / f"{name}.onnx")
    (staging / "manifest.json").write_bytes(text)
    shutil.rmtree(folder / "1.0.0")
    return Slot(digest=m.digest(text), version="1.0.0", variant=name, standing="confirmed")


@pytest.mark.parametrize("rotten", [False, True], ids=["whole", "rotten"])
def test_a_variant_that_runs_stays_until_another_of_its_bundle_is_confirmed(
    slots: Slots, tmp_path: Path, rotten: bool
) -> None:
    first = put_variant(slots, tmp_path, "a")
    slots.stage(first.digest)
    slots.confirm("gas", first)
    if rotten:
        model = slots.path(first.digest) / "a.onnx"
        model.write_bytes(b"x" * model.stat().st_size)
    second = put_variant(slots, tmp_path, "b")
    slots.stage(second.digest)
    assert slots.whole(second.digest, "b")
    # A boot in between starts what is confirmed; what rotted would keep the new variant from loading.
    assert slots.whole(first.digest, "a") is not rotten
    slots.activate("gas", second)
    slots.collect({second.digest})
    assert slots.whole(first.digest, "a") is not rotten
    slots.confirm("gas", second)
    slots.collect({second.digest})
    assert slots.whole(second.digest, "b")
    assert not slots.whole(first.digest, "a")
    assert slots.pointers("gas").previous is None


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "size_mismatch"),
        (lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]), "hash_mismatch"),
        (lambda p: p.unlink(), "size_mismatch"),
    ],
)
def test_a_file_that_is_not_the_manifests_is_named_and_refused(
    slots: Slots, tmp_path: Path, damage: object, code: str
) -> None:
    slot = put(slots, tmp_path, "1.0.0")
    wanted = files(slots, slot)
    damage(slots.staging_path(slot.digest) / "model.onnx")  # type: ignore[operator]
    with pytest.raises(Rejected, match=r"model\.onnx") as caught:
        slots.verify(slot.digest, wanted)
    assert caught.value.code == code
    # The next try brings this one and no other.
    assert not (slots.staging_path(slot.digest) / "model.onnx").exists()
    assert (slots.staging_path(slot.digest) / "manifest.json").exists()
    assert not slots.discard(slot.digest)
    assert slots.staging_path(slot.digest).exists()


def test_only_a_slot_that_was_there_counts_as_taken_away(slots: Slots, tmp_path: Path) -> None:
    assert not slots.discard("0" * 64)
    slot = put(slots, tmp_path, "1.0.0")
    slots.stage(slot.digest)
    assert slots.discard(slot.digest)
    assert not slots.path(slot.digest).exists()


def test_another_manifest_under_the_digest_is_refused(slots: Slots, tmp_path: Path) -> None:
    slot = put(slots, tmp_path, "1.0.0")
    wanted = files(slots, slot)
    path = slots.staging_path(slot.digest) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"1.0.0", b"1.0.1"))
    with pytest.raises(Rejected) as caught:
        slots.verify(slot.digest, wanted)
    assert caught.value.code == "hash_mismatch"


def test_a_trial_that_a_boot_interrupts_leaves_the_confirmed_bundle(slots: Slots, tmp_path: Path) -> None:
    first = confirmed(slots, tmp_path, "1.0.0")
    second = put(slots, tmp_path, "1.1.0")
    slots.stage(second.digest)
    slots.activate("gas", second)
    again = Slots(slots.root)
    assert again.boot() == ({"gas": first}, [])
    assert again.pointers("gas").active == first


def test_a_confirmed_slot_that_is_damaged_gives_way_to_the_previous_one(slots: Slots, tmp_path: Path) -> None:
    first, second = confirmed(slots, tmp_path, "1.0.0"), confirmed(slots, tmp_path, "1.1.0")
    (slots.path(second.digest) / "model.onnx").write_bytes(b"")
    found, complaints = Slots(slots.root).boot()
    assert found == {"gas": first}
    assert "1.1.0" in complaints[0]


def test_a_torn_write_of_the_pointer_file_leaves_the_old_pointers(slots: Slots, tmp_path: Path) -> None:
    first = confirmed(slots, tmp_path, "1.0.0")
    (slots.root / "pointers.json.new").write_bytes(b'{"schema":1,"mod')
    assert Slots(slots.root).boot()[0] == {"gas": first}


def test_a_pointer_file_that_cannot_be_read_is_kept_aside_and_starts_empty(slots: Slots, tmp_path: Path) -> None:
    confirmed(slots, tmp_path, "1.0.0")
    (slots.root / "pointers.json").write_bytes(b"\0" * 100)
    again = Slots(slots.root)
    assert again.boot() == ({}, [])
    assert again.damage
    assert (slots.root / "pointers.json.damaged").exists()


def test_a_person_can_step_back_once(slots: Slots, tmp_path: Path) -> None:
    first, _ = confirmed(slots, tmp_path, "1.0.0"), confirmed(slots, tmp_path, "1.1.0")
    assert slots.step_back("gas")
    assert slots.pointers("gas").confirmed == first
    assert not slots.step_back("gas")
    assert Slots(slots.root).boot()[0] == {"gas": first}


def test_another_key_follows_the_active_bundle_only(slots: Slots, tmp_path: Path) -> None:
    first = confirmed(slots, tmp_path, "1.0.0")
    second = put(slots, tmp_path, "1.1.0")
    slots.stage(second.digest)
    slots.activate("gas", second)
    slots.rekey("gas", arm="candidate", rollout="r", stage=2)
    now = slots.pointers("gas")
    assert (now.confirmed, now.active and now.active.stage) == (first, 2)


def test_collecting_keeps_what_a_pointer_names(slots: Slots, tmp_path: Path) -> None:
    found = [confirmed(slots, tmp_path, f"1.{i}.0") for i in range(4)]
    gone = slots.collect(())
    assert set(gone) == {found[0].digest, found[1].digest}
    assert set(slots.digests()) == {found[2].digest, found[3].digest}
    coming = put(slots, tmp_path, "2.0.0")
    slots.collect({coming.digest})
    assert slots.staging_path(coming.digest).exists()
    slots.collect(())
    assert not slots.staging_path(coming.digest).exists()


def test_what_a_worker_serves_is_not_collected_whatever_the_pointers_name(slots: Slots, tmp_path: Path) -> None:
    going = put(slots, tmp_path, "0.9.0")
    slots.stage(going.digest)
    now = confirmed(slots, tmp_path, "1.0.0")
    slots.in_use = lambda: {going.digest}
    assert slots.collect(()) == ()
    slots.in_use = tuple
    assert slots.collect(()) == (going.digest,)
    assert slots.digests() == (now.digest,)


def test_confirming_twice_keeps_the_previous_one(slots: Slots, tmp_path: Path) -> None:
    first, second = confirmed(slots, tmp_path, "1.0.0"), confirmed(slots, tmp_path, "1.1.0")
    slots.confirm("gas", second)
    assert slots.pointers("gas").previous == first


CHILD = """
import itertools, shutil, sys
from pathlib import Path
from skerry_agent.slots import Slot, Slots
from skerry_contract import manifest as m
slots, bundles = Slots(Path(sys.argv[1])), sorted(Path(sys.argv[2]).iterdir())
slots.boot()
print("up", flush=True)
for folder in itertools.cycle(bundles):
    data = (folder / "manifest.json").read_bytes()
    digest, manifest = m.digest(data), m.parse(data)
    slot = Slot(digest=digest, version=manifest.version, variant=manifest.variants[0].id, standing="confirmed")
    if not slots.whole(digest, slot.variant):
        slots.discard(digest)
        shutil.rmtree(slots.staging_path(digest), ignore_errors=True)
        shutil.copytree(folder, slots.staging_path(digest))
        slots.verify(digest, manifest.files())
        slots.stage(digest)
    slots.activate("gas", slot)
    slots.confirm("gas", slot)
    slots.collect(())
"""


def test_kill_9_anywhere_leaves_one_runnable_version(tmp_path: Path) -> None:
    bundles, root = tmp_path / "bundles", tmp_path / "slots"
    for i in range(3):
        models.build_bundle(bundles / str(i), version=f"1.{i}.0", padding=200_000, seed=i)
    pointed, turn, end = None, 0, time.monotonic() + 120
    while turn < 12 or (pointed is None and time.monotonic() < end):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(root), str(bundles)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        # Later each time: on a slow machine the first kills all fall before anything was confirmed.
        time.sleep(0.01 + 0.011 * turn)
        turn += 1
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        slots = Slots(root)
        pointed = slots.pointers("gas").confirmed
        found, complaints = slots.boot()
        assert complaints == []
        if pointed is not None:
            assert found["gas"] == pointed
            slots.verify(pointed.digest, slots.manifest(pointed.digest).files())  # type: ignore[union-attr]
    assert pointed is not None


def test_what_lies_here_in_part_or_in_another_bundle_need_not_come(slots: Slots, tmp_path: Path) -> None:
    first = confirmed(slots, tmp_path, "1.0.0")
    second = put(slots, tmp_path, "1.1.0")
    wanted = files(slots, second)
    # Both versions were built of the same model file and cases.
    shutil.rmtree(slots.staging_path(second.digest))
    assert slots.present_bytes(second.digest, wanted) == sum(file.size for file in wanted)
    slots.set_aside(first.digest)
    assert slots.present_bytes(second.digest, wanted) == 0
    (slots.root / PARTS).mkdir()
    (slots.root / PARTS / wanted[0].sha256).write_bytes(b"ten bytes.")
    assert slots.present_bytes(second.digest, wanted) == 10
    assert slots.digests() == ()


def test_what_has_come_of_a_bundle_counts_its_files_in_part(slots: Slots, tmp_path: Path) -> None:
    slot = put(slots, tmp_path, "1.0.0")
    staged, whole = slots.staging_path(slot.digest), files(slots, slot)
    before = slots.coming_bytes(slot.digest)
    (staged / "manifest.json").rename(staged / STAGED_MANIFEST)
    assert slots.coming_bytes(slot.digest) == before
    (slots.root / PARTS).mkdir()
    (slots.root / PARTS / whole[0].sha256).write_bytes(b"ten bytes.")
    (slots.root / PARTS / ("0" * 64)).write_bytes(b"of another bundle")
    assert slots.coming_bytes(slot.digest) == before + 10
    assert slots.coming_bytes("") == 0
    assert shared.STAGED_MANIFEST == STAGED_MANIFEST


def test_what_cannot_be_removed_stays_and_keeps_nobody_from_anything(slots: Slots, tmp_path: Path) -> None:
    first, second = put_variant(slots, tmp_path, "a"), "f" * 64
    slots.stage(first.digest)
    slots.path(second).mkdir()
    in_the_way = slots.staging / f"{first.digest}.old"
    in_the_way.write_text("no folder")
    assert slots.collect(()) == (second,)
    assert slots.whole(first.digest, "a")
    in_the_way.unlink()
    assert slots.collect(()) == (first.digest,)


def test_folders_left_by_an_earlier_removal_are_no_obstacle(slots: Slots) -> None:
    slots.path("f" * 64).mkdir()
    left = slots.staging / f"{'f' * 64}.old"
    left.mkdir()
    (left / "file").write_text("left over")
    assert slots.collect(()) == ("f" * 64,)
    assert not left.exists()
