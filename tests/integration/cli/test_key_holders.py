"""Several holders at machines of their own: a ceremony, its record, and the changes after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from skerry_cli.offline_roles import spoken
from skerry_contract import layout
from tuf.api.metadata import Metadata

from tests.machines import Machine

REFUSED, USAGE = 3, 2
People = Callable[[str], Machine]


@pytest.fixture
def person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> People:
    return lambda name: Machine(tmp_path / name, monkeypatch, capsys)


@pytest.fixture
def online(tmp_path: Path) -> Path:
    key = CryptoSigner.generate_ed25519().public_key
    path = tmp_path / "online.pub.json"
    path.write_text(json.dumps({"keys": {key.keyid: key.to_dict()}}))
    return path


class Ceremony:
    """Cleo leads and holds ``targets``; ada and bea hold a root key and approve, each at home."""

    def __init__(self, person: People, online: Path) -> None:
        self.cleo, self.ada, self.bea = person("cleo"), person("ada"), person("bea")
        self.folder = self.cleo.folder / "ceremony"
        self.online = online
        self.fingerprints: dict[str, str] = {}
        for holder, machine in (("ada", self.ada), ("bea", self.bea)):
            for name in (f"{holder}-root", holder):
                made = machine.ok("keys", "make", name, "--json").json()
                self.fingerprints[name] = made["keyid"]
                shutil.copy(made["public"], self.cleo.folder)

    def answers(self, **more: str) -> Path:
        keys = "".join(
            f'[keys.{name}]\npublic = "{name}.pub.json"\nfingerprint = "{more.get(name, keyid)}"\n'
            for name, keyid in self.fingerprints.items()
        )
        path = self.cleo.folder / "answers.toml"
        path.write_text(
            f"""organiser = "Cleo Example"
online = "{self.online}"
signed = [{", ".join(f'"{name}"' for name in more.get("signed", "").split())}]
[holders]
root = ["ada-root", "bea-root"]
targets = ["cleo-targets"]
approver = ["ada", "bea"]
[thresholds]
root = 2
targets = 1
approver = 2
[keys.cleo-targets]
make = true
{keys}"""
        )
        return path

    def go_on(self, *more: str | Path, **answers: str) -> dict:
        path = self.answers(**answers)
        return self.cleo.ok("keys", "ceremony", "--dir", self.folder, "--answers", path, "--json", *more).json()

    def signed_by(self, machine: Machine, *names: str) -> Path:
        copy = machine.folder / f"{names[0]}.request.json"
        shutil.copy(self.folder / "request.json", copy)
        wanted = machine.ok("keys", "review", copy, "--json").json()["sha256"]
        for name in names:
            machine.ok("keys", "sign", copy, "--as", name, "--yes", "--sha256", wanted)
        return copy

    def key(self, name: str) -> dict:
        return json.loads((self.cleo.folder / f"{name}.pub.json").read_bytes())["key"]

    def hold(self) -> Ceremony:
        assert self.go_on()["waiting_for_signatures"] == ["ada-root", "bea-root", "ada", "bea"]
        copies = [
            self.signed_by(self.ada, "ada-root", "ada"),
            self.signed_by(self.bea, "bea-root", "bea"),
        ]
        assert self.go_on("--signed", copies[0], "--signed", copies[1])["finished"]
        self.root_sha256 = json.loads((self.folder / "ceremony.json").read_bytes())["root_sha256"]
        for machine in (self.ada, self.bea):
            machine.ok("keys", "join", self.folder, "--root-sha256", self.root_sha256)
        return self


def test_three_people_make_a_root_and_no_private_key_travels(person: People, online: Path) -> None:
    held = Ceremony(person, online).hold()
    root = Metadata.from_bytes((held.folder / "root.json").read_bytes())
    targets = Metadata.from_bytes((held.folder / "targets.json").read_bytes())
    catalog = Metadata.from_bytes((held.folder / "catalog.json").read_bytes())
    assert (root.signed.roles["root"].threshold, len(root.signatures)) == (2, 2)
    root.signed.verify_delegate("root", root.signed_bytes, root.signatures)
    root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
    targets.signed.verify_delegate(layout.CATALOG_ROLE, catalog.signed_bytes, catalog.signatures)
    names = {
        path.name for path in held.cleo.folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()
    }
    assert names == {"cleo-targets.pem"}, "only her own private key is on the organiser's machine"
    text = (held.folder / "record.md").read_text()
    for keyid in held.fingerprints.values():
        assert " ".join(keyid[i : i + 4] for i in range(0, 64, 4)) in text
    assert "Cleo Example" in text and "ada-root: signed root" in text
    for machine in (held.cleo, held.ada):
        found = machine.ok(
            "keys", "verify-record", "--dir", held.folder if machine is held.cleo else held.ada.keys, "--json"
        )
        assert found.json()["holds"], found.out


def test_an_interrupted_ceremony_goes_on_and_nothing_is_written_over(person: People, online: Path) -> None:
    held = Ceremony(person, online)
    missing = held.cleo.folder / "bea.pub.json"
    kept = missing.read_bytes()
    missing.unlink()
    assert held.go_on()["waiting_for_keys"] == ["bea"]
    assert not (held.folder / "request.json").exists()
    made = (held.folder / "cleo-targets.pem").read_bytes()
    missing.write_bytes(kept)
    assert held.go_on()["waiting_for_keys"] == []
    request = json.loads((held.folder / "request.json").read_bytes())["documents"]["root"]["signed"]
    # Ada's signatures come today, bea's tomorrow, in a run of its own.
    copy = held.signed_by(held.ada, "ada-root", "ada")
    assert held.go_on("--signed", copy)["waiting_for_signatures"] == ["bea-root", "bea"]
    assert held.go_on()["waiting_for_signatures"] == ["bea-root", "bea"]
    assert held.go_on("--signed", held.signed_by(held.bea, "bea-root", "bea"))["finished"]
    assert json.loads((held.folder / "root.json").read_bytes())["signed"] == request
    assert (held.folder / "cleo-targets.pem").read_bytes() == made
    before = {path: path.read_bytes() for path in held.folder.rglob("*") if path.is_file()}
    assert held.go_on()["finished"]
    assert before == {path: path.read_bytes() for path in held.folder.rglob("*") if path.is_file()}


def test_a_key_file_that_an_interrupted_run_did_not_note_is_used_and_not_replaced(person: People, online: Path) -> None:
    held = Ceremony(person, online)
    elsewhere = person("dan")
    elsewhere.environment["SKERRY_KEY_PASSWORD"] = held.cleo.environment["SKERRY_KEY_PASSWORD"]
    made = elsewhere.ok("keys", "make", "cleo-targets", "--json").json()
    held.folder.mkdir()
    shutil.copy(elsewhere.keys / "cleo-targets.pem", held.folder)
    found = held.go_on()
    assert {one["name"]: one["keyid"] for one in found["keys"]}["cleo-targets"] == made["keyid"]
    assert (held.folder / "cleo-targets.pem").read_bytes() == (elsewhere.keys / "cleo-targets.pem").read_bytes()


def test_a_key_that_was_swapped_on_its_way_is_refused(person: People, online: Path) -> None:
    held = Ceremony(person, online)
    thief = person("thief")
    theirs = thief.ok("keys", "make", "ada", "--json").json()
    shutil.copy(theirs["public"], held.cleo.folder / "ada.pub.json")
    done = held.cleo("keys", "ceremony", "--dir", held.folder, "--answers", held.answers(), "--json")
    assert done.code == REFUSED and "read out" in done.err
    assert not (held.folder / "public" / "ada.json").exists()


def test_one_key_under_two_names_and_the_servers_key_are_refused(person: People, online: Path) -> None:
    held = Ceremony(person, online)
    part = json.loads((held.cleo.folder / "ada.pub.json").read_bytes())
    (held.cleo.folder / "bea.pub.json").write_text(json.dumps(part | {"name": "bea"}))
    answers = held.answers(bea=part["keyid"])
    done = held.cleo("keys", "ceremony", "--dir", held.folder, "--answers", answers)
    assert done.code == REFUSED and "ada's key" in done.err
    (keyid, key), *_ = json.loads(online.read_bytes())["keys"].items()
    (held.cleo.folder / "bea.pub.json").write_text(json.dumps({"schema": 1, "name": "bea", "keyid": keyid, "key": key}))
    done = held.cleo("keys", "ceremony", "--dir", held.folder, "--answers", held.answers(bea=keyid))
    assert done.code == REFUSED and "online key" in done.err


def test_what_the_organiser_changes_after_the_plan_is_not_signed_nor_merged(person: People, online: Path) -> None:
    held = Ceremony(person, online)
    held.go_on()
    copy = held.signed_by(held.ada, "ada-root", "ada")
    honest = held.ada.ok("keys", "review", copy, "--json").json()["sha256"]
    value = json.loads(copy.read_bytes())
    value["documents"]["root"]["signed"]["roles"]["root"]["threshold"] = 1
    changed = held.bea.folder / "changed.json"
    changed.write_text(json.dumps(value))
    seen = held.bea.ok("keys", "review", changed, "--json").json()
    assert seen["sha256"] != honest and seen["documents"][0]["signed_by"] == []
    done = held.bea("keys", "sign", changed, "--as", "bea-root", "--yes", "--sha256", honest)
    assert done.code == REFUSED and "wanted" in done.err
    blind = held.bea("keys", "sign", changed, "--as", "bea-root", "--yes")
    assert blind.code == REFUSED and "nobody has looked at" in blind.err
    late = held.cleo("keys", "ceremony", "--dir", held.folder, "--answers", held.answers(), "--signed", changed)
    assert late.code == REFUSED and "do not say the same" in late.err


def test_a_person_is_shown_everything_and_may_say_no(person: People, online: Path) -> None:
    held = Ceremony(person, online)
    held.go_on()
    copy = held.ada.folder / "request.json"
    shutil.copy(held.folder / "request.json", copy)
    before = copy.read_bytes()
    no = held.ada("keys", "sign", copy, "--as", "ada", given="n\n")
    assert no.code == REFUSED and copy.read_bytes() == before
    for keyid in held.fingerprints.values():
        assert " ".join(keyid[i : i + 4] for i in range(0, 64, 4)) in no.out
    closed = held.ada("keys", "sign", copy, "--as", "ada", given="")
    assert closed.code == REFUSED and "got no answer" in closed.err
    assert held.ada("keys", "sign", copy, "--as", "nobody", given="y\n").code == USAGE
    yes = held.ada.ok("keys", "sign", copy, "--as", "ada", given="y\n")
    assert "1 more of bea for targets version 1" in yes.out


def test_a_changed_record_or_document_is_told(person: People, online: Path) -> None:
    held = Ceremony(person, online).hold()
    for file, before, after, said in (
        ("root.json", "2027", "2028", "sha256"),
        ("record.md", "2 of 2", "1 of 2", "does not say"),
        ("ceremony.json", '"approver": 2', '"approver": 1', "2 must sign, the record says 1"),
        ("ceremony.json", '"catalog": "20', '"catalog": "30', "catalog expires 20"),
    ):
        path = held.folder / file
        text = path.read_text()
        path.write_text(text.replace(before, after, 1))
        assert path.read_text() != text
        done = held.cleo("keys", "verify-record", "--dir", held.folder)
        assert done.code == REFUSED and said in done.out, done
        joined = held.cleo("keys", "join", held.folder, "--root-sha256", held.root_sha256)
        assert joined.code == REFUSED and not held.cleo.keys.exists()
        path.write_text(text)
    # What no document holds is told to be somebody's word, with a number to compare.
    before = held.cleo.ok("keys", "verify-record", "--dir", held.folder).out
    assert before.count("compare sha256") == 1
    record = held.folder / "ceremony.json"
    record.write_text(record.read_text().replace("Cleo Example", "Mallory"))
    words = held.folder / "record.md"
    words.write_text(words.read_text().replace("Cleo Example", "Mallory"))
    assert held.cleo.ok("keys", "verify-record", "--dir", held.folder).out != before


def test_join_refuses_another_root_than_the_one_read_aloud(person: People, online: Path) -> None:
    held = Ceremony(person, online).hold()
    dan = person("dan")
    done = dan("keys", "join", held.folder, "--root-sha256", "0" * 64)
    assert done.code == REFUSED and not dan.keys.exists()


def rotated(held: Ceremony, *change: str | Path) -> Path:
    request = held.ada.folder / "next.json"
    request.unlink(missing_ok=True)
    held.ada.ok("keys", "rotate", "--out", request, *change)
    return request


def signed_apart(machine: Machine, request: Path, name: str) -> Path:
    copy = machine.folder / f"{name}.{request.name}"
    shutil.copy(request, copy)
    machine.ok("keys", "sign", copy, "--as", name, given="y\n")
    return copy


def test_next_root_replaces_a_holder_by_signatures_from_two_machines(person: People, online: Path) -> None:
    held = Ceremony(person, online).hold()
    dan = person("dan")
    part = dan.ok("keys", "make", "dan-root", "--json").json()["public"]
    dan.ok("keys", "join", held.folder, "--root-sha256", held.root_sha256)
    request = rotated(held, "--add-root", part, "--remove-root", "bea-root")
    shown = held.bea.ok("keys", "review", request, "--json").json()
    assert [line[:17] for line in shown["documents"][0]["changes"][1:]] == ["+ root: dan-root ", "- root: bea-root "]
    assert "as the request says" in shown["documents"][0]["changes"][1]
    # The old root wants ada and bea, the new one ada and dan: each signs alone, and none waits for another.
    copies = [
        signed_apart(held.ada, request, "ada-root"),
        signed_apart(held.bea, request, "bea-root"),
        signed_apart(dan, request, "dan-root"),
    ]
    early = held.ada("keys", "collect", request, copies[0], copies[1], "--json")
    assert early.code == 0 and not early.json()["complete"]
    assert early.json()["documents"][0]["lacks"] == [{"for": "root version 2", "wanted": 1, "of": ["dan-root"]}]
    assert not (held.ada.keys / "2.root.json").exists()
    done = held.ada.ok("keys", "collect", request, copies[2], "--json").json()
    assert done["complete"] and (held.ada.keys / "2.root.json").exists()
    for machine in (held.bea, dan):
        machine.ok("keys", "accept", held.ada.keys / "2.root.json")
        assert machine.ok("keys", "show", "--json").json()["newest"] == {"root": 2, "targets": 1}
    assert held.ada.ok("keys", "verify-record", "--json").json()["holds"]
    # Whoever was taken out can sign no later root.
    third = rotated(held, "--root")
    lost = held.bea("keys", "sign", third, "--as", "bea-root", given="y\n")
    assert lost.code == REFUSED and "named by none" in lost.err


def test_targets_key_changes_with_root_and_targets_in_one_request(person: People, online: Path) -> None:
    held = Ceremony(person, online).hold()
    dan = person("dan")
    part = dan.ok("keys", "make", "dan-targets", "--json").json()["public"]
    dan.ok("keys", "join", held.folder, "--root-sha256", held.root_sha256)
    request = rotated(held, "--add-targets", part, "--remove-targets", "cleo-targets")
    copies = [
        signed_apart(held.ada, request, "ada-root"),
        signed_apart(held.bea, request, "bea-root"),
        signed_apart(dan, request, "dan-targets"),
    ]
    held.ada.ok("keys", "collect", request, *copies)
    assert held.ada.ok("keys", "show", "--json").json()["newest"] == {"root": 2, "targets": 2}
    assert held.ada.ok("keys", "verify-record", "--json").json()["holds"]


@pytest.mark.parametrize(
    ("option", "role"), [("--add-root", "root"), ("--add-targets", "root"), ("--add-approver", "targets")]
)
def test_a_strangers_key_under_a_holders_fingerprint_is_signed_by_nobody(
    person: People, online: Path, option: str, role: str
) -> None:
    held = Ceremony(person, online).hold()
    dan, thief = person("dan"), person("thief")
    part = dan.ok("keys", "make", "dan", "--json").json()
    theirs = thief.ok("keys", "make", "dan", "--json").json()
    request = rotated(held, option, part["public"])
    value = json.loads(request.read_bytes())
    signed = value["documents"][role]["signed"]
    keys = signed["keys"] if role == "root" else signed["delegations"]["keys"]
    keys[part["keyid"]]["keyval"] = theirs["key"]["keyval"]
    request.write_text(json.dumps(value))
    for command in (("review",), ("sign", "--as", "bea-root")):
        done = held.bea("keys", command[0], request, *command[1:], given="y\n")
        assert done.code == REFUSED and "does not follow from its key" in done.err
        assert part["keyid"][:16] in done.err and theirs["keyid"][:16] in done.err
    assert json.loads(request.read_bytes())["documents"][role]["signatures"] == []


@pytest.mark.attack("homoglyph name")
def test_a_name_that_draws_lines_of_its_own_beside_a_fingerprint_is_shown_and_signed_by_nobody(
    person: People, online: Path
) -> None:
    """A request on its way: the stranger's key stands where dan's was, and its name looks like the line that was there."""
    held = Ceremony(person, online).hold()
    dan = person("dan").ok("keys", "make", "dan", "--json").json()
    theirs = person("thief").ok("keys", "make", "dan", "--json").json()
    text = rotated(held, "--add-approver", theirs["public"]).read_text()
    line = f"+ catalog: dan (as the request says)  {spoken(dan['keyid'])}"
    padded = line.ljust(160)[len("+ catalog: ") :] + "- catalog: dan-old"
    request = held.bea.folder / "next.json"
    for name in (padded, "d\u0430n", "dan ", "", "x" * 200_000, 7, None):
        value = json.loads(text)
        assert value["names"][theirs["keyid"]] == "dan"
        value["names"][theirs["keyid"]] = name
        request.write_text(json.dumps(value))
        done = held.bea("keys", "review", request)
        assert done.code == USAGE and "a holder's name must match" in done.err and len(done.err) < 300, done
        assert not done.out
    done = held.bea("keys", "sign", request, "--as", "bea-root", given="y\n")
    assert done.code == USAGE and json.loads(request.read_bytes()) == value
    # Nor does it come by what was taken in before: a record that somebody else led, or the history.
    record = held.folder / "ceremony.json"
    kept = record.read_text()
    record.write_text(kept.replace('"name": "ada"', json.dumps({"name": padded})[1:-1], 1))
    done = person("eve")("keys", "join", held.folder, "--root-sha256", held.root_sha256)
    assert done.code == REFUSED and "a holder's name must match" in done.err
    done = held.cleo("keys", "show", "--dir", held.folder)
    assert done.code == USAGE and "ceremony.json: a holder's name must match" in done.err
    record.write_text(kept)
    with (held.bea.keys / "history.jsonl").open("a") as file:
        file.write(json.dumps({"at": "", "what": "", "sha256": "", "names": {theirs["keyid"]: padded}}) + "\n")
    done = held.bea("keys", "rotate", "--root", "--out", held.bea.folder / "other.json")
    assert done.code == USAGE and "history.jsonl: a holder's name must match" in done.err


def test_a_strangers_key_in_a_first_root_is_signed_by_nobody(person: People, online: Path) -> None:
    held = Ceremony(person, online)
    held.go_on()
    theirs = person("thief").ok("keys", "make", "bea", "--json").json()
    value = json.loads((held.folder / "request.json").read_bytes())
    keys = value["documents"]["targets"]["signed"]["delegations"]["keys"]
    keys[held.fingerprints["bea"]]["keyval"] = theirs["key"]["keyval"]
    copy = held.ada.folder / "copy.json"
    copy.write_text(json.dumps(value))
    done = held.ada("keys", "sign", copy, "--as", "ada-root", given="y\n")
    assert done.code == REFUSED and "does not follow from its key" in done.err


def test_versions_are_neither_skipped_nor_replaced_nor_blind(person: People, online: Path) -> None:
    held = Ceremony(person, online).hold()
    request = rotated(held, "--root")
    copies = [signed_apart(held.ada, request, "ada-root"), signed_apart(held.bea, request, "bea-root")]
    held.ada.ok("keys", "collect", request, *copies)
    second = request.read_bytes()
    third = rotated(held, "--root")
    # Bea has not seen version 2: she cannot be made to sign version 3.
    done = held.bea("keys", "review", third)
    assert done.code == REFUSED and "wanted version 2, got 3" in done.err and "keys accept" in done.err
    value = json.loads(second)
    value["documents"]["root"]["signed"]["roles"]["timestamp"]["keyids"].append(held.fingerprints["ada"])
    value["documents"]["root"]["signed"]["keys"][held.fingerprints["ada"]] = held.key("ada")
    (held.bea.folder / "hidden.json").write_text(json.dumps(value))
    hidden = held.bea("keys", "review", held.bea.folder / "hidden.json")
    assert hidden.code == REFUSED and "holds more than keys" in hidden.err
    value["documents"]["root"]["signed"]["keys"].pop(held.fingerprints["ada"])
    (held.bea.folder / "lacking.json").write_text(json.dumps(value))
    lacking = held.bea("keys", "review", held.bea.folder / "lacking.json")
    assert lacking.code == REFUSED and "does not hold it" in lacking.err
    value = json.loads(second)
    value["documents"]["root"]["signed"]["expires"] = "2099-01-01T00:00:00Z"
    (held.bea.folder / "long.json").write_text(json.dumps(value))
    assert "within 365 days" in held.bea("keys", "review", held.bea.folder / "long.json").err
    forged = held.bea.folder / "2.root.json"
    data = json.loads((held.ada.keys / "2.root.json").read_bytes())
    data["signatures"] = data["signatures"][:1]
    forged.write_text(json.dumps(data))
    few = held.bea("keys", "accept", forged)
    assert few.code == REFUSED and "wanted: 1 more" in few.err and not (held.bea.keys / "2.root.json").exists()


def test_an_unnoted_later_version_shows_in_the_check(person: People, online: Path) -> None:
    held = Ceremony(person, online).hold()
    request = rotated(held, "--root")
    copies = [signed_apart(held.ada, request, "ada-root"), signed_apart(held.bea, request, "bea-root")]
    held.ada.ok("keys", "collect", request, *copies)
    shutil.copy(held.ada.keys / "2.root.json", held.bea.keys)
    done = held.bea("keys", "verify-record")
    assert done.code == REFUSED and "2.root.json is not in history.jsonl" in done.out


def test_a_person_is_walked_through_and_nothing_is_taken_without_their_word(person: People, online: Path) -> None:
    cleo, ada = person("cleo"), person("ada")
    part = Path(ada.ok("keys", "make", "ada", "--json").json()["public"])
    folder = cleo.folder / "ceremony"
    plan = f"Cleo\nroot\n1\ntargets\n1\nada\n1\n{online}\n"
    # Root and targets are made here; of ada's file she is asked whether ada read out the same, and says no.
    no = cleo("keys", "ceremony", "--dir", folder, given=f"{plan}m\nm\nh\n{part}\nn\n")
    assert no.code == REFUSED and "were not compared" in no.err
    keyid = json.loads(part.read_bytes())["keyid"]
    assert " ".join(keyid[i : i + 4] for i in range(0, 64, 4)) in no.err
    # Asked again for ada alone: what was answered is kept. The documents are shown; root is signed now, targets later.
    half = cleo.ok("keys", "ceremony", "--dir", folder, given=f"h\n{part}\ny\ny\nn\n")
    assert "+ root: root" in half.out and "Signatures are wanted of targets, ada" in half.out
    copy = ada.folder / "request.json"
    shutil.copy(folder / "request.json", copy)
    ada.ok("keys", "sign", copy, "--as", "ada", given="y\n")
    done = cleo.ok("keys", "ceremony", "--dir", folder, "--signed", copy, given="y\n")
    assert "The ceremony is done" in done.out
    assert cleo.ok("keys", "verify-record", "--dir", folder, "--json").json()["holds"]
