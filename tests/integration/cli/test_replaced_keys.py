"""A key that was lost or stolen is replaced with the tool alone, on a real server, and does not come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from skerry_server import online_keys
from tuf.api.metadata import Metadata, Root, Targets

from tests.integration.cli.conftest import Cli, CliHere
from tests.rig_server import ServerRig

OK, USAGE, REFUSED = 0, 2, 3


@pytest.fixture
def here(cli: Cli) -> CliHere:
    return CliHere(cli.folder, cli.environment)


def ok(cli: CliHere, *arguments: str | Path) -> str:
    done = cli(*arguments)
    assert done.code == OK, done.err
    return done.out


def signed(cli: CliHere, request: Path, *names: str) -> None:
    for name in names:
        digest = json.loads(ok(cli, "keys", "review", request, "--json"))["sha256"]
        ok(cli, "keys", "sign", request, "--as", name, "--sha256", digest, "--yes")


def other_targets_key(cli: CliHere, folder: Path, request: Path, *, old: str, new: str) -> None:
    ok(cli, "keys", "make", new, "--no-password")
    part = folder / "keys" / f"{new}.pub.json"
    ok(cli, "keys", "rotate", "--out", request, "--add-targets", part, "--remove-targets", old)
    signed(cli, request, "root", new)


def served(server: ServerRig) -> tuple[int, int]:
    status = server.good("GET", "/api/v1/repository/status")
    return status["root"]["version"], status["targets"]["version"]


def test_a_targets_key_is_replaced_on_the_server_with_one_command_or_later(
    here: CliHere, server: ServerRig, folder: Path, tmp_path: Path
) -> None:
    other_targets_key(here, folder, tmp_path / "2.json", old="targets", new="dan")
    ok(here, "keys", "collect", tmp_path / "2.json", "--publish")
    assert served(server) == (2, 2)
    keys = folder / "keys"
    for number, (old, new) in ((3, ("dan", "eve")), (4, ("eve", "fay"))):
        other_targets_key(here, folder, tmp_path / f"{number}.json", old=old, new=new)
        ok(here, "keys", "collect", tmp_path / f"{number}.json")
        assert served(server) == (number - 1, number - 1)
        files = [keys / f"{number}.root.json", keys / f"{number}.targets.json"]
        ok(here, "keys", "publish", *(files if number == 3 else reversed(files)))
        assert served(server) == (number, number)
    # Several versions at once, of which a server takes one after the other.
    for number in (5, 6):
        ok(here, "keys", "rotate", "--out", tmp_path / f"{number}.json", "--root")
        signed(here, tmp_path / f"{number}.json", "root")
        ok(here, "keys", "collect", tmp_path / f"{number}.json")
    ok(here, "keys", "publish", keys / "5.root.json", keys / "6.root.json")
    assert served(server) == (6, 4)


def test_an_online_key_that_was_taken_out_does_not_come_back(cli: Cli, tmp_path: Path) -> None:
    data, keys = tmp_path / "server", tmp_path / "keys"
    (first,) = online_keys.open_all(data)
    document = data / "online.pub.json"
    here = CliHere(cli.folder, {**cli.environment, "SKERRY_KEYS": str(keys)})
    ok(here, "keys", "init", "--dir", keys, "--no-password", "--online", document)
    named = [first.public_key.keyid]
    for number in (2, 3):
        made = online_keys.add(data).public_key.keyid
        request = tmp_path / f"{number}.json"
        ok(here, "keys", "rotate", "--out", request, "--add-online", document, "--remove-online", named[-1])
        signed(here, request, "root", "targets")
        ok(here, "keys", "collect", request)
        named.append(made)
        root = Metadata[Root].from_bytes((keys / f"{number}.root.json").read_bytes()).signed
        targets = Metadata[Targets].from_bytes((keys / f"{number}.targets.json").read_bytes()).signed
        assert root.roles["timestamp"].keyids == root.roles["snapshot"].keyids == [made]
        assert targets.delegations is not None and targets.delegations.roles is not None
        assert targets.delegations.roles["fleet"].keyids == [made]
    # Neither by a list of all keys that the server ever had, nor by a request that somebody else made.
    everything = tmp_path / "all.json"
    everything.write_text(json.dumps(json.loads(document.read_bytes())["keys"]))
    back = here("keys", "rotate", "--out", tmp_path / "4.json", "--add-online", everything)
    assert back.code == REFUSED and "brings back the online key" in back.err
    assert not (tmp_path / "4.json").exists()
    ok(here, "keys", "rotate", "--out", tmp_path / "5.json", "--root")
    value = json.loads((tmp_path / "5.json").read_bytes())
    root_document = value["documents"]["root"]["signed"]
    root_document["keys"][named[0]] = first.public_key.to_dict()
    for role in ("timestamp", "snapshot"):
        root_document["roles"][role]["keyids"].append(named[0])
    (tmp_path / "5.json").write_text(json.dumps(value))
    done = here("keys", "sign", tmp_path / "5.json", "--as", "root", given="y\n")
    assert done.code == REFUSED and f"brings back the online key {named[0][:16]}" in done.err


def test_a_newest_online_key_that_is_not_listed_is_refused(cli: Cli, tmp_path: Path) -> None:
    online_keys.open_all(tmp_path)
    value = json.loads((tmp_path / "online.pub.json").read_bytes())
    (tmp_path / "wrong.json").write_text(json.dumps({"keys": value["keys"], "newest": "ab" * 32}))
    done = CliHere(cli.folder, cli.environment)(
        *("keys", "init", "--dir", tmp_path / "k", "--no-password", "--online", tmp_path / "wrong.json")
    )
    assert done.code == USAGE and "its newest key and does not list it" in done.err
