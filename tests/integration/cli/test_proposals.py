"""M of N people approve, each on a machine of their own, against a real server: wait, sign, meet, withdraw, revoke."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from skerry_cli import key_files, keys
from skerry_contract import canonical, layout
from tuf.api.metadata import Metadata, TargetFile, Targets

from tests import models
from tests.integration.cli.conftest import CliHere
from tests.rig_server import ServerRig

OK, FAILED, USAGE, REFUSED = 0, 1, 2, 3
PEOPLE = ("ada", "bea", "cyd")


class Office:
    """Three approvers, two of whom must sign. Each has a folder with the ceremony's documents and one private key."""

    def __init__(self, server: ServerRig, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.environment = {
            "SKERRY_SERVER": str(server.ready["url"]),
            "SKERRY_TOKEN": (server.data / "admin.token").read_text().strip(),
            "SKERRY_CA": str(server.data / "ca" / "ca.pem"),
        }
        self.vault = folder / "vault"
        admin = CliHere(folder, self.environment)
        people = [part for name in PEOPLE for part in ("--approver", name)]
        held = admin("keys", "init", "--dir", self.vault, "--no-password", "--publish", "--threshold", "2", *people)
        assert held.code == OK, held.err
        self.cli = {}
        for name in PEOPLE:
            shutil.copytree(self.vault, folder / name)
            for key in (folder / name).glob("*.pem"):
                if key.stem != name:
                    key.unlink()
            token = server.good("POST", "/api/v1/tokens", {"name": name, "role": "approver"})["token"]
            keys_of = {"SKERRY_KEYS": str(folder / name), "SKERRY_TOKEN": token}
            self.cli[name] = CliHere(folder / name, {**self.environment, **keys_of})
        self.admin = CliHere(folder, {**self.environment, "SKERRY_KEYS": str(self.vault)})

    def push(self, version: str) -> str:
        path = self.folder / f"gas-{version}"
        models.build_bundle(path, model="gas", version=version)
        assert self.admin("push", path).code == OK
        return canonical.sha256((path / "manifest.json").read_bytes())

    def propose(self, name: str, *what: str, beside: str) -> str:
        done = self.cli[name](*what, "--as", name, "--with", beside, "--yes", "--json")
        assert done.code == OK, done.err
        assert (done.json()["posted"], done.json()["signatures"], done.json()["threshold"]) == (False, 1, 2)
        return str(done.json()["proposal"])

    def sign(self, name: str, proposal: str, *more: str) -> None:
        done = self.cli[name]("proposal", "sign", proposal, "--as", name, "--yes", "--json", *more)
        assert done.code == OK, done.err
        assert done.json()["posted"]

    def catalog(self) -> tuple[int, list[str]]:
        status = self.admin("info", "--json").json()["repository"]["catalog"]
        name = f"{status['version']}.catalog.json"
        data = (self.server.data / "repository" / layout.METADATA_DIR / name).read_bytes()
        listed = Metadata[Targets].from_bytes(data).signed.targets
        return status["version"], sorted(path.split("/")[2] for path in listed if path != layout.FLOORS_TARGET)


@pytest.fixture(scope="module")
def office(server: ServerRig, tmp_path_factory: pytest.TempPathFactory) -> Office:
    return Office(server, tmp_path_factory.mktemp("office"))


def test_a_proposal_waits_for_the_second_approver_who_rebuilds_it(office: Office) -> None:
    digest = office.push("1.0.0")
    proposal = office.propose("ada", "approve", digest, beside="bea")
    assert office.catalog() == (1, []), "one of two is not enough"

    (waiting,) = office.cli["cyd"]("proposal", "list", "--json").json()["items"]
    record = json.loads((office.vault / "ceremony.json").read_bytes())["keys"]
    of = {entry["keyid"]: entry["name"] for entry in record}
    assert (waiting["id"], waiting["state"], waiting["version"]) == (proposal, "open", 2)
    assert [of[keyid] for keyid in waiting["signed"]] == ["ada"]
    assert sorted(of[keyid] for keyid in waiting["missing"]) == ["bea", "cyd"]
    assert waiting["changes"]["added"] == [{"model": "gas", "version": "1.0.0", "digest": digest}]
    shown = office.cli["bea"]("proposal", "show", proposal)
    assert shown.code == OK
    assert all(words in shown.out for words in ("1 of 2", "ada", f"+ gas@1.0.0  {digest}")), shown.out

    sign = ("proposal", "sign", proposal, "--as", "bea")
    blind = office.cli["bea"](*sign, "--yes")
    assert blind.code == REFUSED and "nobody looks" in blind.err
    other = office.cli["bea"](*sign, "--yes", "--expect", "0" * 64)
    assert other.code == REFUSED and "--expect says" in other.err
    no = office.cli["bea"](*sign, given="n\n")
    assert no.code == REFUSED and f"+ gas@1.0.0  {digest}" in no.out
    unnamed = office.cli["cyd"]("proposal", "sign", proposal, "--as", "cyd", "--expect", digest, "--yes")
    assert unnamed.code == REFUSED and "do not all name 'cyd'" in unnamed.err
    assert office.catalog() == (1, [])
    office.sign("bea", proposal, "--expect", digest)
    assert office.catalog() == (2, ["1.0.0"])
    assert office.cli["ada"]("proposal", "list", "--json").json()["items"] == []
    ended = office.cli["ada"]("proposal", "show", proposal, "--json").json()
    assert (ended["state"], len(ended["signed"])) == ("published", 2)
    again = office.cli["bea"](*sign, "--yes", "--expect", digest)
    assert again.code == REFUSED and "published" in again.err


def test_of_two_proposals_that_meet_the_second_is_applied_anew(office: Office) -> None:
    version, _ = office.catalog()
    second = office.push("1.1.0")
    first = office.propose("ada", "floor", "set", "gas", "1.0.0", beside="bea")
    late = office.propose("cyd", "approve", second, beside="bea")
    office.sign("bea", first)
    assert office.catalog()[0] == version + 1
    said = office.cli["bea"]("proposal", "show", late, "--json").json()
    assert said["state"] == "void" and "rebase" in said["reason"]
    refused = office.cli["bea"]("proposal", "sign", late, "--as", "bea", "--expect", second, "--yes")
    assert refused.code == REFUSED and "void" in refused.err

    rebase = ("proposal", "rebase", late, "--as", "cyd", "--yes", "--json")
    blind = office.cli["cyd"](*rebase)
    assert blind.code == REFUSED and "nobody looks at what comes in" in blind.err
    stranger = office.cli["ada"]("proposal", "rebase", late, "--as", "ada", "--yes", "--json", "--expect", second)
    assert stranger.code != OK and "to be signed by cyd, bea, not by ada" in stranger.err
    done = office.cli["cyd"](*rebase, "--expect", second)
    assert done.code == OK, done.err
    assert "its 1 signatures are void" in done.err
    assert [entry["digest"] for entry in done.json()["added"]] == [second]
    assert done.json()["floors"] == [], "the other one's floor is in the catalog, and no change any more"
    office.sign("bea", done.json()["proposal"], "--expect", second)
    assert office.catalog() == (version + 2, ["1.0.0", "1.1.0"])
    empty = office.cli["cyd"]("proposal", "rebase", late, "--as", "cyd", "--yes")
    assert empty.code == REFUSED and "withdrawn" in empty.err


def test_a_withdrawn_proposal_takes_no_signature(office: Office) -> None:
    proposal = office.propose("ada", "floor", "set", "gas", "1.1.0", "--ahead", beside="bea")
    gone = office.cli["cyd"]("proposal", "withdraw", proposal, "--reason", "too early", "--json")
    assert (gone.code, gone.json()["state"]) == (OK, "withdrawn")
    late = office.cli["bea"]("proposal", "sign", proposal, "--as", "bea", "--yes")
    assert late.code == REFUSED and "too early" in late.err
    actions = [row["action"] for row in office.admin("audit", "--json").json()["items"]]
    assert {"proposal.open", "proposal.sign", "proposal.withdraw"} <= set(actions)


@pytest.mark.attack("stolen server slips a bundle in")
def test_a_stolen_server_that_slips_a_bundle_into_a_proposal_gets_no_signature(office: Office) -> None:
    proposal = office.propose("ada", "floor", "set", "gas", "1.1.0", "--ahead", beside="bea")
    with sqlite3.connect(office.server.data / "server.db", timeout=30) as db:
        ((data,),) = db.execute("SELECT metadata FROM proposals WHERE id = ?", (proposal,)).fetchall()
        slipped = Metadata[Targets].from_bytes(data)
        path = layout.manifest_target("gas", "6.6.6")
        custom = {"submitter": "admin", "approvers": ["ada", "bea"]}
        slipped.signed.targets[path] = TargetFile(1000, {"sha256": "6" * 64}, path, {"custom": custom})
        db.execute("UPDATE proposals SET metadata = ? WHERE id = ?", (slipped.to_bytes(), proposal))
    refused = office.cli["bea"]("proposal", "sign", proposal, "--as", "bea", given="y\n")
    assert refused.code == REFUSED and "no approver's signature holds" in refused.err
    assert "6.6.6" not in office.catalog()[1]
    assert office.cli["bea"]("proposal", "withdraw", proposal, "--reason", "forged").code == OK


def test_a_signer_is_revoked_with_a_catalog_of_the_others_in_one_snapshot(office: Office) -> None:
    version, listed = office.catalog()
    before = office.admin("info", "--json").json()["repository"]
    ceremony = keys.read_ceremony(office.vault)
    kept = [key_files.load_signer(ceremony.key_path(name), None).public_key for name in ("bea", "cyd")]
    targets = keys.next_targets(
        ceremony.targets,
        root=ceremony.root,
        signers=[key_files.load_signer(ceremony.key_path("targets"), None)],
        now=dt.datetime.now(dt.UTC),
        approver_keys={key.keyid: key for key in kept},
    )
    (office.folder / "targets.json").write_bytes(targets)
    what = (
        "approve",
        "--renew",
        "--targets",
        str(office.folder / "targets.json"),
        "--as",
        "bea",
        "--with",
        "cyd",
        "--yes",
    )
    mine = office.cli["bea"](*what)
    assert mine.code == REFUSED and "admin" in mine.err, "who may sign is not for approvers to say"
    office.cli["bea"].environment["SKERRY_TOKEN"] = office.admin.environment["SKERRY_TOKEN"]
    proposed = office.cli["bea"](*what, "--json")
    assert proposed.code == OK, proposed.err
    proposal = proposed.json()["proposal"]
    assert office.admin("info", "--json").json()["repository"] == before
    gone = office.cli["ada"]("proposal", "sign", proposal, "--as", "ada", "--yes")
    assert gone.code == REFUSED and "not one of the approvers" in gone.err
    office.sign("cyd", proposal)
    after = office.admin("info", "--json").json()["repository"]
    moved = {role: after[role]["version"] - before[role]["version"] for role in ("targets", "catalog", "snapshot")}
    assert moved == {"targets": 1, "catalog": 1, "snapshot": 1}
    assert office.catalog() == (version + 1, listed)
    late = office.cli["ada"]("floor", "set", "gas", "1.1.0", "--as", "ada", "--with", "bea", "--yes")
    assert late.code == REFUSED and "not one of the approvers" in late.err
