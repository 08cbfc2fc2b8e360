"""An encrypted bundle from the engineer's machine to an answer, everything real, and what thieves find on the way."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from skerry_agent import config, opening
from skerry_cli import bundle, catalog, publishing
from skerry_cli.demo.fleet import GROUP
from skerry_cli.errors import Failed

from tests import models
from tests.updating_site import DEVICE, Site

KEYS = [secrets.token_bytes(32), secrets.token_bytes(32)]
WEIGHTS = [os.urandom(200_000)]
WEIGHTS.append(WEIGHTS[0][:150_000] + os.urandom(5_000) + WEIGHTS[0][155_000:])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    try:
        found.start()
        yield found
    finally:
        found.close()
        for state in tmp_path.rglob("agent.toml"):
            if (folder := opening.folder_of(config.load(state, {}))) is not None:
                shutil.rmtree(folder, ignore_errors=True)


def found_in(folder: Path, needles: list[bytes]) -> list[str]:
    wrong, looked = [], 0
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data, looked = path.read_bytes(), looked + 1
            wrong += [str(path) for needle in needles if needle in data]
    assert looked > 5
    return wrong


def in_memory(state: Path) -> Path:
    found = opening.folder_of(config.load(state.parent / "agent.toml", {}))
    assert found is not None
    return found


def needles(site: Site, number: int) -> list[bytes]:
    """Pieces of each file of the bundle, from all over it, that do not stand in its public manifest."""
    folder = site.folder / f"bundle-{number}"
    manifest = (folder / "manifest.json").read_bytes()
    found = []
    for name in ("model.onnx", "golden.jsonl", "weights.bin"):
        data = (folder / name).read_bytes()
        found += [data[at : at + 32] for at in range(0, len(data) - 32, max(32, len(data) // 20))]
    return [needle for needle in found if needle not in manifest] + [KEYS[number - 1]]


def ask_itself(site: Site, model: str = "gas") -> dict[str, Any]:
    with contextlib.suppress(Failed):
        return dict(site.fleet.status(DEVICE)["running"].get(model, {}))
    return {}


def beside_it(site: Site) -> None:
    """A second model on the device, in the clear."""
    folder = site.folder / "hum"
    digest = models.build_bundle(folder, "hum", "1.0.0")
    publishing.push(site.fleet.api, bundle.read_bundle(folder))
    addition = catalog.Addition(model="hum", version="1.0.0", digest=digest, submitter="test")
    site.fleet.approver.change(catalog.Change(add=(addition,)), now=dt.datetime.now(dt.UTC), folder=folder)
    site.fleet.api.put(f"/api/v1/groups/{GROUP}/models/hum", {"stable": digest})
    site.fleet.wait("the other model", lambda: ask_itself(site, "hum").get("state") == "confirmed_on_golden", 90.0)


def courier(verb: str, message: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "skerry_agent.courier", verb], input=json.dumps(message).encode(),
        capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.attack("stolen repository")
def test_an_encrypted_bundle_is_served_and_lies_in_the_clear_in_memory_alone(site: Site, tmp_path: Path) -> None:
    first = site.publish(1, {"weights.bin": WEIGHTS[0]}, KEYS[0])
    site.assign(first)
    state = site.fleet.device_folder(DEVICE) / "state"
    opened = in_memory(state)
    assert (opened / first / "weights.bin").read_bytes() == WEIGHTS[0]
    assert opened.stat().st_mode & 0o777 == 0o700
    # A stolen repository, and a stolen card as it lies: no piece of a file, no content key.
    assert found_in(site.fleet.server.data / "repository", needles(site, 1)) == []
    assert found_in(state, needles(site, 1)) == []

    said = {one["check"]: one for one in doctor(site)["findings"]}
    assert said["runtime"]["verdict"] == "ok", said["runtime"]

    # The next version has another content key, and all the same comes as a delta: of what is in both, encrypted itself.
    second = site.publish(2, {"weights.bin": WEIGHTS[1]}, KEYS[1])
    row = site.delta_to(2)
    assert (row["state"], row["path"]) == ("ready", "weights.bin")
    assert 5_000 < row["bytes"] < 10_000
    assert found_in(site.fleet.server.data / "repository", needles(site, 1) + needles(site, 2)) == []
    assert not list((site.fleet.server.data / "deltas").iterdir()), "nothing in the clear is left there"
    came, told = site.update(second)
    assert told["refused"] == {}
    assert told["delta_bytes"] == row["bytes"]
    assert told["patched_bytes"] > 200_000 > came
    assert (opened / second / "weights.bin").read_bytes() == WEIGHTS[1]
    assert found_in(state, needles(site, 1) + needles(site, 2)) == []

    # Power is lost: memory is empty, and so is the network. A key that cannot be used keeps down what it opens, and nothing else. Nor does another
    # user of the device who saw the folder's name and takes it first, with a link to where he may not write himself.
    beside_it(site)
    site.fleet.processes.stop([DEVICE, "server"])
    shutil.rmtree(opened)
    opened.symlink_to(state)
    taken = opened
    key = state / "identity" / "encryption.key"
    kept = key.read_bytes()
    key.write_bytes(b"rotten")
    site.fleet.start_agent(DEVICE)
    site.fleet.wait("the other model", lambda: ask_itself(site, "hum").get("state") == "confirmed_on_golden", 60.0)
    assert "encryption_key_unusable" in site.fleet.processes.log(DEVICE).read_text()
    opened = in_memory(state)
    assert opened != taken
    assert not any(opened.glob("*/weights.bin"))
    site.fleet.processes.stop([DEVICE])

    # The card and its key bring the model back.
    key.write_bytes(kept)
    site.fleet.start_agent(DEVICE)
    site.fleet.wait("the model to answer without a network", lambda: ask_itself(site).get("digest") == second, 60.0)
    assert (opened / second / "weights.bin").read_bytes() == WEIGHTS[1]
    site.fleet.processes.stop([DEVICE])
    assert taken.is_symlink()
    assert (state / "identity" / "device.key").exists(), "what the link leads to is as it was"
    taken.unlink()

    # A thief of the card. With the key in a file on it, he opens the model: that is what a token is for.
    card = tmp_path / "card"
    shutil.copytree(state, card, ignore=shutil.ignore_patterns("*.sock", "run"))
    loot = tmp_path / "loot"
    loot.mkdir(mode=0o700)
    message = {
        "state_dir": str(card), "server_url": site.fleet.server.url, "now_s": time.time(), "digest": second,
        "variant": "onnx-fp32", "folder": str(loot),
    }  # fmt: skip
    assert courier("unseal", message)["ok"]["bytes"] > 200_000
    shutil.rmtree(loot / second)
    # Without it: nothing, and the server is not even asked for what it would not give.
    (card / "identity" / "encryption.key").unlink()
    refused = courier("unseal", message)["error"]
    assert refused["code"] == "unreachable", "a new key would have to be told to the server, which is off"
    assert found_in_nothing(loot, WEIGHTS[1])

    # Nor does the server, once it is there, give anything to a key that the thief made beside the stolen signing key.
    site.fleet.processes.start(
        "server", [sys.executable, "-m", "skerry_server", "run", "--data", str(site.fleet.server.data)]
    )
    deadline = time.monotonic() + 40
    while refused["code"] == "unreachable" and time.monotonic() < deadline:
        time.sleep(0.5)
        refused = courier("unseal", message)["error"]
    assert refused["code"] == "encryption_key_differs"
    assert found_in_nothing(loot, WEIGHTS[1])


def doctor(site: Site) -> dict[str, Any]:
    config_file = site.fleet.device_folder(DEVICE) / "agent.toml"
    command = [sys.executable, "-m", "skerry_agent", "doctor", "--config", str(config_file), "--json"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    return dict(json.loads(done.stdout))


def found_in_nothing(folder: Path, data: bytes) -> bool:
    return not any(data[:32] in path.read_bytes() for path in folder.rglob("*") if path.is_file())
