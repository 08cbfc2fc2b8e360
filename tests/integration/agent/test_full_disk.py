"""The device's disk fills up under load, or runs out of names for files: serving goes on, deletes work, updates wait, counts are right.

A real file system of 32 MB: an ext4 in a file, or a tmpfs that counts files. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.agent import test_outbox_life
from tests.integration.agent.rig import ROOT, Device, Load, wait_for
from tests.integration.agent.test_doctor import examine, verdict
from tests.integration.agent.test_outbox_life import Server, empty

server = test_outbox_life.server

MAKE = ("mkfs.ext4", "-q", "-m", "0", "-N", "600")


def lacking() -> str:
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    if shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        return "mkfs.ext4 is not installed (on Debian: apt install e2fsprogs)"
    return ""


@contextlib.contextmanager
def small_disk(folder: Path, image: Path, kind: str) -> Iterator[None]:
    """Mounts a small file system over what is in the folder."""
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    if kind == "ext4":
        with image.open("wb") as file:
            file.truncate(48 << 20)
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        subprocess.run([*MAKE, str(image)], check=True, env={**os.environ, "PATH": path})
        mount = ["mount", "-o", "loop", str(image), str(folder)]
    else:
        mount = ["mount", "-t", "tmpfs", "-o", "size=48m,nr_inodes=400", "none", str(folder)]
    subprocess.run(mount, check=True)
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def serving(request: pytest.FixtureRequest, device: Device, server: Server, tmp_path: Path) -> Iterator[Device]:
    why = lacking()
    if why and os.environ.get("CI") == "true":
        pytest.fail(why)
    if why:
        pytest.skip(why)
    with device.config.open("a") as file:
        file.write("[labels]\npredictions = 1000\n")
    text = device.config.read_text().replace(
        "[limits]\ndisk_reserve_mb = 0.0",
        "[limits]\noutbox_mb = 10.0\noutbox_free_mb = 2.0\ndisk_reserve_mb = 4.0\nfile_reserve = 16",
    )
    device.config.write_text(text)
    device.publish(device.bundle("1.0.0"))
    with small_disk(device.state_dir, tmp_path / "disk.img", request.getfixturevalue("kind")):
        device.start()
        device.wait_running("1.0.0", "trial")
        device.infer(20)
        device.wait_running("1.0.0", "confirmed")
        wait_for(lambda: server.inferences() == 20 and empty(device), why="a quiet start")
        yield device
        device.close()


def fill(device: Device) -> Path:
    path = device.state_dir / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return path


def use_up_names(device: Device) -> Path:
    folder = device.state_dir / "filler"
    folder.mkdir()
    with contextlib.suppress(OSError):
        for number in range(10_000):
            (folder / str(number)).touch()
    return folder


@pytest.mark.parametrize(
    ("kind", "exhaust"),
    [
        ("ext4", fill), ("tmpfs", use_up_names), pytest.param("tmpfs", fill, marks=pytest.mark.slow),
        pytest.param("ext4", use_up_names, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_disk_that_is_full_under_load(
    serving: Device,
    server: Server,
    kind: str,
    exhaust: Callable[[Device], Path],
) -> None:
    server.announce("offline")
    wait_for(lambda: not serving.status()["link"]["server_online"], why="offline heard")
    with Load(serving, clients=2, pause_s=0.01) as load:
        wait_for(lambda: serving.status()["outbox"]["pending"] > 3, why="something that waits")
        filler = exhaust(serving)
        asked = load.ok
        time.sleep(2.5)
        assert load.ok > asked + 20, "serving stopped"
        # An update is refused before a byte of it is fetched.
        serving.publish(serving.bundle("1.1.0", seed=1))
        serving.sync()
        serving.wait_update("idle", "not_enough_disk")
        assert not list((serving.state_dir / "slots").glob(".staging/*"))
        assert serving.running()[0] == "1.0.0"
        # What waits can leave, and is deleted, while the disk is still full.
        waiting = serving.status()["outbox"]["pending_inferences"]
        assert waiting > 0
        taken = server.inferences()
        server.birth += 1
        server.announce("online")
        wait_for(lambda: server.inferences() >= taken + waiting, why=lambda: f"{waiting} more: {serving.log()[-3000:]}")
        wait_for(lambda: serving.status()["outbox"]["pending"] < 5, why=lambda: f"deletes: {serving.log()[-3000:]}")
        if filler.is_dir():
            shutil.rmtree(filler)
        else:
            filler.unlink()
        time.sleep(1.0)
    assert load.failed == []
    made = load.ok + 20
    wait_for(
        lambda: server.inferences() >= made and empty(serving),
        why=lambda: f"{made}, got {server.inferences()}: {serving.log()[-3000:]}",
    )
    assert (server.inferences(), server.ledger.conflicts) == (made, 0)
    assert serving.status()["outbox"]["lost"] == {}
    serving.sync(pardon=True)
    serving.wait_running("1.1.0", "trial", "confirmed")


@pytest.mark.parametrize(
    ("kind", "exhaust"),
    [("ext4", fill), pytest.param("tmpfs", use_up_names, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("ended", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_start_on_a_full_disk_serves_tells_what_is_wrong_and_recovers(
    serving: Device, server: Server, kind: str, exhaust: Callable[[Device], Path], ended: str
) -> None:
    if ended == "killed":
        server.announce("offline")
        wait_for(lambda: not serving.status()["link"]["server_online"], why="offline heard")
        serving.infer(7)
        serving.kill()
    else:
        serving.infer(7)
        assert serving.stop() == 0
    filler = exhaust(serving)
    begun = time.monotonic()
    serving.start()
    wait_for(lambda: serving.infer() == ["1.0.0"], why=lambda: f"an answer: {serving.log()[-3000:]}")
    print(f"start on a full disk to the first answer: {time.monotonic() - begun:.2f} s")
    made = 28
    assert serving.running() == ("1.0.0", "confirmed")
    made += len(serving.infer(20))
    # What is wrong stands in the log, and a person who asks is told.
    assert "store_full" in serving.log()
    told = verdict(examine(serving), "disk")
    assert told[0] == "fail", told
    if filler.is_dir():
        shutil.rmtree(filler)
    else:
        filler.unlink()
    if ended == "killed":
        server.birth += 1
        server.announce("online")
    wait_for(
        lambda: server.inferences() >= made and empty(serving),
        why=lambda: f"{made}, got {server.inferences()}: {serving.log()[-3000:]}",
    )
    assert (server.inferences(), server.ledger.conflicts) == (made, 0)
    assert serving.status()["outbox"]["lost"] == {}


@pytest.mark.parametrize("kind", ["tmpfs"])
def test_a_card_that_can_only_be_read_is_named_and_nothing_on_it_is_moved(
    serving: Device, server: Server, kind: str
) -> None:
    assert serving.stop() == 0
    files = sorted(path.name for path in serving.state_dir.glob("state.db*"))
    subprocess.run(["mount", "-o", "remount,ro", str(serving.state_dir)], check=True)
    command = [sys.executable, "-m", "skerry_agent", "run", "--config", str(serving.config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "storage_failed" in ended.stderr
    assert "Read-only file system" in ended.stderr
    told = verdict(examine(serving), "state folder")
    assert told[0] == "fail"
    subprocess.run(["mount", "-o", "remount,rw", str(serving.state_dir)], check=True)
    assert sorted(path.name for path in serving.state_dir.glob("state.db*")) == files
    serving.start()
    wait_for(lambda: serving.infer() == ["1.0.0"], why="an answer")
    wait_for(lambda: server.inferences() == 21 and empty(serving), why="all counts")
