"""The folder in memory where encrypted models lie open, in a place where anybody may put what he likes under its name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from skerry_agent import config, memory_folder, opening
from skerry_agent.config import Config
from skerry_agent.doctor.finding import Patient
from skerry_agent.doctor.models import check_runtime
from skerry_agent.slots import Slot, Slots
from skerry_contract import manifest as m

from tests import models, strangers

KEY = b"k" * 32


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder on a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def configured(state: Path, memory: Path) -> Config:
    (state / "slots").mkdir(parents=True, exist_ok=True)
    return config.build({"state_dir": str(state), "encryption": {"memory_dir": str(memory)}}, {})


def prepared(found: Config) -> Path:
    """As after a start: what is known was noted."""
    return opening.prepared(found, opening.folder_of(found))


def test_the_folder_stays_while_it_is_there_and_has_another_name_after_a_power_cut(
    tmp_path: Path, memory: Path
) -> None:
    found = configured(tmp_path / "state", memory)
    assert opening.folder_of(found) is None
    first = prepared(found)
    assert memory_folder.is_ours(first)
    assert prepared(found) == opening.folder_of(found) == first
    shutil.rmtree(first)
    second = prepared(found)
    assert second != first, "a name that others saw is theirs to take"
    assert list(memory.iterdir()) == [second]


def test_a_courier_that_fetches_the_first_encrypted_bundle_has_a_place_for_its_delta(
    tmp_path: Path, memory: Path
) -> None:
    found = configured(tmp_path / "state", memory)
    slots = Slots(found.state_dir / "slots")
    manifests = []
    for name, key in (("plain", b""), ("encrypted", KEY)):
        models.build_bundle(tmp_path / name, **({"content_key": key} if key else {}))
        manifests.append(m.parse((tmp_path / name / m.MANIFEST_FILE).read_bytes()))
    assert opening.for_download(found, slots, manifests[0]) == ""
    assert list(memory.iterdir()) == [], "nothing is opened of a bundle in the clear"
    folder = opening.for_download(found, slots, manifests[1])
    assert memory_folder.is_ours(Path(folder))
    assert slots.opened == Path(folder)
    nowhere = configured(tmp_path / "state", tmp_path)
    assert opening.for_download(nowhere, slots, manifests[1]) == "", "the delta is left away, the bundle is fetched"


@pytest.mark.parametrize("note", ["", "/", "relative", "/etc", "\0", "cut"])
def test_a_note_that_a_crash_cut_short_names_no_folder(tmp_path: Path, memory: Path, note: str) -> None:
    found = configured(tmp_path / "state", memory)
    first = prepared(found)
    noted = tmp_path / "state" / "slots" / ".opened"
    noted.write_text(noted.read_text()[:-1] if note == "cut" else note)
    assert opening.folder_of(found) is None
    assert prepared(found) != first


def test_a_disk_that_takes_no_note_keeps_no_model_dark(tmp_path: Path, memory: Path) -> None:
    found = configured(tmp_path / "state", memory)
    (tmp_path / "state" / "slots" / ".opened").mkdir()
    folder = opening.prepared(found, None)
    assert memory_folder.is_ours(folder)
    assert opening.prepared(found, folder) == folder
    assert list(memory.iterdir()) == [folder]


def test_two_agents_of_one_copied_state_have_two_folders(tmp_path: Path, memory: Path) -> None:
    first = prepared(configured(tmp_path / "state", memory))
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    second = prepared(configured(tmp_path / "copy", memory))
    assert first != second
    assert memory_folder.is_ours(first)


def test_another_place_takes_the_folder_out_of_the_one_before_it(tmp_path: Path, memory: Path) -> None:
    first = prepared(configured(tmp_path / "state", memory))
    (first / "weights").write_bytes(b"in the clear")
    other = memory / "other"
    other.mkdir()
    assert prepared(configured(tmp_path / "state", other)).parent == other
    assert not first.exists()


@pytest.mark.attack("symlink")
@pytest.mark.parametrize("way", strangers.WAYS)
def test_whoever_takes_the_folders_name_first_keeps_no_model_dark_and_loses_nothing(
    tmp_path: Path, memory: Path, way: str
) -> None:
    found = configured(tmp_path / "state", memory)
    name = prepared(found)
    name.rmdir()
    theirs = strangers.take(name, way)
    (theirs / "precious").write_bytes(b"precious")
    folder = prepared(found)
    assert memory_folder.is_ours(folder)
    assert folder not in (name, theirs)
    # What is ours and open to others may hold what is in the clear: it goes.
    assert (theirs / "precious").exists() == (way != "open")


def test_doctor_says_who_has_the_folders_name_and_what_is_wrong_with_its_place(tmp_path: Path, memory: Path) -> None:
    found = configured(tmp_path / "state", memory)
    slots = Slots(found.state_dir / "slots")
    digest = models.build_bundle(tmp_path / "bundle", content_key=KEY)
    shutil.copytree(tmp_path / "bundle", slots.path(digest))
    slots.confirm("gas", Slot(digest=digest, version="1.0.0", variant="onnx-fp32", standing="confirmed"))

    def said(config: Config) -> str:
        (finding,) = [one for one in check_runtime(Patient(config=config)) if "not open in memory" in one.detail]
        assert finding.verdict == "warn"
        return finding.detail

    assert said(found).endswith("nothing is built from it")
    name = prepared(found)
    name.rmdir()
    strangers.take(name, "link")
    assert f"({name}: lrwxrwxrwx of user {os.getuid()} has the folder's name; the agent makes another)" in said(found)
    assert f"({tmp_path}: wanted a tmpfs, it is" in said(configured(tmp_path / "state", tmp_path))


@pytest.mark.attack("symlink")
@pytest.mark.parametrize("way", strangers.WAYS)
def test_what_stands_under_the_folders_name_is_neither_read_nor_emptied_unless_it_is_ours(
    tmp_path: Path, way: str
) -> None:
    bundle = tmp_path / "bundle"
    digest = models.build_bundle(bundle, content_key=KEY)
    name = tmp_path / "memory"
    slots = Slots(tmp_path / "state" / "slots", name)
    shutil.copytree(bundle, slots.path(digest))
    manifest = slots.manifest(digest)
    assert manifest is not None
    variant = manifest.variants[0].id

    name.mkdir(mode=0o700)
    shutil.copytree(bundle, name / digest)
    assert slots.is_open(digest, variant)
    assert slots.load_path(digest) == name / digest
    (name / ".half.new").mkdir()
    (name / ("0" * 64)).mkdir()
    slots.boot()
    slots.collect([digest])
    assert os.listdir(name) == [digest], "what a courier left, and what no slot has, goes"

    shutil.rmtree(name)
    theirs = strangers.take(name, way)
    shutil.copytree(bundle, theirs / digest)
    assert not slots.is_open(digest, variant)
    assert not slots.load_path(digest).exists()
    if way != "open":
        for folder in ("identity", ".hidden"):
            (theirs / folder).mkdir()
            (theirs / folder / "precious").write_bytes(b"precious")
        slots.boot()
        slots.collect([])
        assert (theirs / "identity" / "precious").read_bytes() == b"precious"
        assert (theirs / ".hidden" / "precious").read_bytes() == b"precious"
        assert (theirs / digest).exists()
