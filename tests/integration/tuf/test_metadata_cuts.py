"""Power fails before every change that a refresh makes to the disk: there is always a root, and the next refresh goes through."""

import itertools
import json
import os
import shutil

import pytest
from tuf.ngclient import Updater

from tests.integration.tuf.power_disk import PowerDisk
from tests.integration.tuf.shelf import Client, Repo


def news(repo):
    """Everything changes, the root twice."""
    repo.delegate("sub")
    repo.publish("root", "root", "sub", "targets", "snapshot", "timestamp")


def refresh(client):
    client.refresh().get_targetinfo("x")


def root_of(folder):
    return json.loads((folder / "root.json").read_bytes())["signed"]["version"]


def cut_everywhere(client, scratch, judge):
    """Runs a refresh, and calls ``judge`` with what a cut leaves at each change. Returns the number of cuts."""
    numbers = itertools.count()

    def cut(_changes):
        for kind in ("names", "synced"):
            left = scratch / f"{next(numbers)}"
            disk.left(kind, left)
            judge(left)
            shutil.rmtree(left)

    disk = PowerDisk(client.folder, cut)
    with disk.watching():
        refresh(client)
    return disk.changes


def test_no_cut_leaves_a_device_without_a_root_or_unable_to_refresh(tmp_path):
    repo = Repo()
    client = Client(repo, tmp_path / "tuf")
    refresh(client)
    news(repo)
    roots = []

    def judge(left):
        roots.append(root_of(left))
        again = Client(repo, left)
        refresh(again)
        assert again.trusted() == {"root": 3, "timestamp": 2, "snapshot": 2, "targets": 2, "sub": 1}
        # What was begun and cut is not left lying.
        assert [path.name for path in left.rglob("*") if path.name.endswith(".new")] == []

    # Per file: old scratch, new scratch, sync, rename, sync; six files, and the link to the root.
    assert cut_everywhere(client, tmp_path, judge) > 30
    assert roots[0] == 1
    assert roots[-1] == 3
    assert sorted(roots[::2]) == roots[::2]


def test_the_first_refresh_may_be_cut_anywhere(tmp_path):
    repo = Repo()
    client = Client(repo, tmp_path / "tuf")
    client.folder.mkdir()

    def judge(left):
        refresh(Client(repo, left))
        assert root_of(left) == 1

    assert cut_everywhere(client, tmp_path, judge) > 15


@pytest.mark.parametrize("careless", ["_persist_file", "_update_root_symlink"])
def test_the_cuts_find_what_tufs_own_way_of_writing_leaves(tmp_path, careless):
    """Without this, the tests above could pass on a disk that loses nothing."""
    kind = type("Careless", (Client(Repo(), tmp_path).kind,), {careless: getattr(Updater, careless)})
    repo = Repo()
    client = Client(repo, tmp_path / "tuf", kind)
    refresh(client)
    news(repo)
    faults = []

    def judge(left):
        for path in (left / "root.json", *left.glob("*.json")):
            try:
                json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                faults.append(error)

    cut_everywhere(client, tmp_path, judge)
    assert faults
    assert os.path.exists(client.folder / "root.json")
