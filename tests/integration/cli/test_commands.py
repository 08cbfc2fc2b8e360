"""What a person types, on a real server: results, exit codes, and one clear line for every wrong input."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from skerry_cli import keyring, model_signers, signing
from skerry_cli.bundle import read_bundle
from skerry_cli.errors import Usage
from skerry_contract import canonical, enrolment, wire
from skerry_contract import window as w

from tests import models
from tests.integration.cli.conftest import Cli
from tests.rig_server import DeviceRig, ServerRig

OK, FAILED, USAGE, REFUSED = 0, 1, 2, 3


def test_a_bundle_goes_from_a_folder_to_a_rollout(cli: Cli, bundle: Path) -> None:
    digest = canonical.sha256((bundle / "manifest.json").read_bytes())
    pushed = cli("push", bundle, "--json")
    assert (pushed.code, pushed.json()["state"], pushed.json()["digest"]) == (OK, "validated", digest)
    assert cli("push", bundle, "--json").json()["sent_bytes"] == 0

    early = cli("rollout", "start", "gas@1.0.0", "--group", "field")
    assert early.code == REFUSED and "not_approved" in early.err

    no = cli("approve", "gas@1.0.0", given="n\n")
    assert no.code == REFUSED and "+ gas@1.0.0" in no.out and digest in no.out
    for silence in ((), ("--json",)):
        closed = cli("approve", "gas@1.0.0", *silence, given="")
        assert closed.code == REFUSED and "'Sign this?' got no answer: nothing was signed" in closed.err, closed.err
    assert cli("rollout", "start", "gas@1.0.0", "--group", "field").code == REFUSED, "still not approved"
    # With --yes nobody looks at the digest that the server names: it must be said, or shown in a folder.
    blind = cli("approve", "gas@1.0.0", "--json", "--yes")
    assert blind.code == REFUSED and "the server alone" in blind.err
    yes = cli("approve", digest, "--json", "--yes")
    assert yes.code == OK
    assert [entry["digest"] for entry in yes.json()["added"]] == [digest] and yes.json()["posted"]

    started = cli(
        "rollout", "start", "gas@1.0.0", "--group", "field", "--stage", "share=1,max=60", "--id", "r-1", "--json"
    )
    assert (started.code, started.json()["state"]) == (OK, "running")
    assert "was not looked at by the judge" in cli("rollout", "explain", "r-1").out
    shown = cli("rollout", "show", "r-1", "--json").json()
    assert shown["decisions"][0]["action"] == "start"
    assert cli("rollout", "pause", "r-1", "--reason", "look", "--if-version", str(shown["version"])).code == OK
    late = cli("rollout", "abort", "r-1", "--reason", "late", "--if-version", str(shown["version"]))
    assert late.code == FAILED and "moved_on" in late.err and "rollout.pause by token:admin" in late.err
    assert cli("rollout", "list", "--json").json()["items"][0]["state"] == "paused"
    assert cli("rollout", "resume", "r-1", "--reason", "seen").code == OK
    first = cli("rollout", "rollback", "r-1", "--reason", "it hums")
    assert first.code == FAILED and "first_bundle" in first.err and "abort takes it away" in first.err
    assert cli("rollout", "abort", "r-1", "--reason", "a test").code == OK
    watched = cli("rollout", "watch", "r-1", "--timeout", "20")
    assert watched.code == FAILED and "a test" in watched.out

    lines = cli("rollout", "watch", "r-1", "--json", "--timeout", "20")
    seen = [json.loads(line) for line in lines.out.splitlines()]
    assert lines.code == FAILED
    assert [line["type"] for line in seen[:-1]] == ["decision"] * (len(seen) - 1)
    moves = [line["action"] for line in seen[:-1] if line["action"] != "hold"]
    assert moves == ["start", "pause", "resume", "abort"]
    assert (seen[-1]["type"], seen[-1]["id"], seen[-1]["state"]) == ("rollout", "r-1", "aborted")

    actions = [row["action"] for row in cli("audit", "--json").json()["items"]]
    assert {"bundle.push", "rollout.start", "rollout.abort"} <= set(actions)


def test_a_rollout_is_followed_line_by_line_while_it_moves(cli: Cli, folder: Path) -> None:
    models.build_bundle(folder / "slow-1", model="slow", version="1.0.0")
    assert cli("push", folder / "slow-1").code == OK
    assert cli("approve", "slow@1.0.0", "--from", folder / "slow-1", "--yes").code == OK
    assert cli("rollout", "start", "slow@1.0.0", "--group", "field", "--id", "r-slow").code == OK
    with cli.open("rollout", "watch", "r-slow", "--json", "--timeout", "60") as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        assert (first["type"], first["action"]) == ("decision", "start"), "at once, though the rollout runs on"
        assert cli("rollout", "abort", "r-slow", "--reason", "seen enough").code == OK
        rest = [json.loads(line) for line in watching.stdout]
        assert watching.wait(30) == FAILED
    assert [line["action"] for line in rest[:-1]][-1] == "abort"
    assert (rest[-1]["state"], rest[-1]["reason"]) == ("aborted", "seen enough")


def test_giving_up_on_a_rollout_says_where_it_stands(cli: Cli, folder: Path) -> None:
    models.build_bundle(folder / "still-1", model="still", version="1.0.0")
    assert cli("push", folder / "still-1").code == OK
    assert cli("approve", "still@1.0.0", "--from", folder / "still-1", "--yes").code == OK
    assert cli("rollout", "start", "still@1.0.0", "--group", "field", "--id", "r-still").code == OK
    late = cli("rollout", "watch", "r-still", "--json", "--timeout", "0.1")
    assert late.code == FAILED and "still running after 0.1 s" in late.err
    assert json.loads(late.out.splitlines()[-1])["state"] == "running"
    assert cli("rollout", "abort", "r-still", "--reason", "a test").code == OK


def test_a_bundle_in_use_is_taken_out_only_by_force(cli: Cli, tmp_path: Path) -> None:
    digest = models.build_bundle(tmp_path / "b", model="used")
    assert cli("push", tmp_path / "b").code == OK
    assert cli("approve", digest, "--yes").code == OK
    assert cli("rollout", "start", digest, "--group", "field", "--id", "r-used").code == OK
    kept = cli("approve", "--remove", "used@1.0.0", "--yes")
    assert kept.code == REFUSED and "in use by group:field, rollout:r-used" in kept.err and "--force" in kept.err
    assert cli("approve", "--renew", "--yes", "--json").json()["removed"] == [], "nothing was signed"
    out = cli("approve", "--remove", "used@1.0.0", "--yes", "--force", "--json")
    assert out.code == OK and [entry["version"] for entry in out.json()["removed"]] == ["1.0.0"]
    assert "in use by group:field" in out.err
    assert cli("rollout", "abort", "r-used", "--reason", "it is gone").code == OK


def test_a_version_is_put_in_the_shadow_of_another_and_taken_out_of_it(
    cli: Cli, server: ServerRig, tmp_path: Path
) -> None:
    one, two = (
        models.build_bundle(tmp_path / v, model="seen", version=v, seed=i) for i, v in enumerate(("1.0.0", "1.1.0"))
    )
    for folder, digest in (("1.0.0", one), ("1.1.0", two)):
        assert cli("push", tmp_path / folder).code == OK
        assert cli("approve", digest, "--yes").code == OK
    early = cli("group", "shadow", "field", "seen", "seen@1.1.0")
    assert early.code != OK and "seen" in early.err
    assert cli("group", "shadow", "field", "seen", "seen@1.1.0", "--off").code == USAGE
    server.good("PUT", "/api/v1/groups/field/models/seen", {"stable": one})
    put = cli("group", "shadow", "field", "seen", "seen@1.1.0", "--json")
    assert put.json() == {"group": "field", "model": "seen", "shadow": two}
    assert cli("group", "show", "field", "--json").json()["models"]["seen"]["shadow"] == two
    assert two[:12] in cli("group", "shadow", "field", "seen", two).out
    same = cli("group", "shadow", "field", "seen", one)
    assert same.code != OK and "already_stable" in same.err
    assert cli("group", "shadow", "field", "seen", "--json").json() == {"items": []}
    assert cli("group", "shadow", "field", "seen", "--off", "--json").json()["shadow"] is None
    assert "no shadow any more" in cli("group", "shadow", "field", "seen", "--off").out


def test_settings_of_a_group_are_changed_one_by_one(cli: Cli) -> None:
    assert cli("group", "create", "tuned", "--set", "sync_s=300").code == OK
    assert cli("group", "create", "tuned", "--set", "window_s=20").code == OK
    shown = cli("group", "show", "tuned", "--json").json()
    assert shown["settings"] == {"sync_s": 300, "window_s": 20}
    assert cli("group", "create", "tuned", "--set", "sync_s=").code == OK
    assert cli("group", "show", "tuned", "--json").json()["settings"] == {"window_s": 20}


def test_a_floor_only_goes_down_when_asked_twice(cli: Cli) -> None:
    assert cli("floor", "set", "other", "2.0.0", "--ahead", "--yes").code == OK
    down = cli("floor", "set", "other", "1.0.0", "--yes")
    assert down.code == REFUSED and "lowers it" in down.err and "--lower" in down.err
    assert cli("floor", "set", "other", "1.0.0", "--lower", "--yes").code == OK


def test_a_floor_that_no_approved_bundle_reaches_is_a_slip_of_the_finger_until_it_is_said_twice(cli: Cli) -> None:
    unknown = cli("floor", "set", "gass", "1.0.0", "--forced", "--yes")
    assert unknown.code == REFUSED and "lists none of 'gass'" in unknown.err
    # A person who is asked reads it before the question, and cannot wave it through.
    asked = cli("floor", "set", "gass", "1.0.0", "--forced", given="y\n")
    assert asked.code == REFUSED and "! no bundle of gass reaches 1.0.0" in asked.out
    meant = cli("floor", "set", "gass", "1.0.0", "--forced", "--ahead", "--yes", "--json")
    assert meant.code == OK, meant.err
    assert meant.json()["beyond"] == [{"model": "gass", "floor": "1.0.0", "highest": ""}]
    assert cli("floor", "set", "gass", "none", "--lower", "--yes").code == OK


def test_a_changed_file_is_refused_before_anything_is_sent(cli: Cli, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b", model="changed")
    file = next(path for path in (tmp_path / "b").iterdir() if path.suffix == ".onnx")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert cli("bundle", "verify", tmp_path / "b").code == REFUSED
    assert cli("push", tmp_path / "b").code == REFUSED
    assert cli("approve", "changed@1.0.0", "--from", tmp_path / "b", "--yes").code == USAGE


def test_a_bundle_that_the_server_rejects_fails_the_push(cli: Cli, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b", model="broken", kind="always-one")
    done = cli("push", tmp_path / "b")
    assert done.code == FAILED and "golden_failed" in done.err
    refused = cli("approve", "broken@1.0.0", "--from", tmp_path / "b", "--yes")
    assert refused.code == REFUSED and "rejected" in refused.err


def test_an_enrolment_token_carries_the_operators_root_and_ca(cli: Cli, server: ServerRig) -> None:
    done = cli("device", "token", "--group", "field", "--device", "d-1", "--json")
    parsed = enrolment.parse(done.json()["token"])
    keys = Path(cli.environment["SKERRY_KEYS"])
    assert parsed.root_sha256 == canonical.sha256((keys / "root.json").read_bytes())
    assert parsed.ca_sha256 == cli("info", "--json").json()["ca_sha256"]
    assert parsed.server_url == server.ready["url"]
    assert cli("device", "token", "--group", "field").code == USAGE


def test_the_ca_can_be_pinned_by_its_fingerprint(cli: Cli) -> None:
    fingerprint = cli("info", "--json").json()["ca_sha256"]
    assert cli("info", SKERRY_CA=fingerprint).code == OK
    assert cli("info", SKERRY_CA=":".join(fingerprint[i : i + 2] for i in range(0, 64, 2)).upper()).code == OK
    wrong = cli("info", SKERRY_CA="ab" * 32)
    assert wrong.code == REFUSED and "pinned one is abab" in wrong.err


def test_a_server_of_another_ca_is_refused(cli: Cli, tmp_path: Path) -> None:
    other = ServerRig(tmp_path / "other")
    done = cli("info", SKERRY_CA=str(other.data / "ca" / "ca.pem"))
    assert done.code == REFUSED and "certificate" in done.err


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "said"),
    [
        (("device", "show", "nope"), {}, USAGE, "no device 'nope'"),
        (("device", "show", "../x"), {}, USAGE, "skerry:"),
        (("rollout", "start", "gas@9.9.9", "--group", "field"), {}, USAGE, "gas@9.9.9: not in the register"),
        (("rollout", "start", "gas@1", "--group", "field"), {}, USAGE, "wanted MAJOR.MINOR.PATCH"),
        (("rollout", "start", "x", "--group", "field", "--stage", "devices=many"), {}, USAGE, "wanted a number"),
        (("rollout", "start", "x", "--group", "field", "--stage", "colour=1"), {}, USAGE, "wanted KEY=NUMBER"),
        (("rollout", "start", "x", "--group", "field", "--judge", "end_s=soon"), {}, USAGE, "wanted KEY=NUMBER"),
        (("rollout", "start", "x", "--group", "field", "--small-fleet"), {}, USAGE, "wanted --judge too"),
        (("rollout", "start", "x", "--group", "field", "--guardrail", "trouble,0.1"), {}, USAGE, "wanted KEY=NUMBER"),
        (("group", "create", "field", "--set", "sync_s=soon"), {}, USAGE, "wanted a number"),
        (("group", "create", "Field!"), {}, USAGE, "wanted [a-z0-9]"),
        (("keys", "show", "--dir", "/nonexistent"), {}, USAGE, "finished ceremony"),
        (("bundle", "inspect", "/nonexistent"), {}, USAGE, "no manifest.json"),
        (("no-such-command",), {}, USAGE, "No such command"),
        (("device", "list"), {"SKERRY_TOKEN": "skt_wrong"}, USAGE, "does not know this token"),
        (("device", "list"), {"SKERRY_TOKEN": ""}, USAGE, "a token (--token FILE or SKERRY_TOKEN)"),
        (("device", "list"), {"SKERRY_SERVER": "https://127.0.0.1:1"}, FAILED, "cannot be reached"),
        (("device", "list"), {"SKERRY_SERVER": "http://127.0.0.1:1"}, USAGE, "wanted https://"),
        (("approve", "0" * 64, "--yes", "--as", "mallory"), {}, USAGE, "no key 'mallory'"),
    ],
)
def test_wrong_input_is_one_clear_line(
    cli: Cli, arguments: tuple[str, ...], environment: dict[str, str], code: int, said: str
) -> None:
    done = cli(*arguments, **environment)
    assert (done.code, said in done.err) == (code, True), (done.code, done.err)
    assert len(done.err.strip().splitlines()) <= 2


def test_a_role_that_may_not_is_told_so(cli: Cli, server: ServerRig, bundle: Path) -> None:
    from skerry_cli.client import Api
    from skerry_cli.profile import Profile

    admin = Api(
        Profile(
            server=server.ready["url"], token=cli.environment["SKERRY_TOKEN"], ca=Path(cli.environment["SKERRY_CA"])
        )
    )
    viewer = admin.post("/api/v1/tokens", {"name": "viewer-1", "role": "viewer"})["token"]
    assert cli("device", "list", SKERRY_TOKEN=viewer).code == OK
    done = cli("push", bundle, SKERRY_TOKEN=viewer)
    assert done.code == REFUSED and "engineer" in done.err


def test_sign_and_verify(cli: Cli, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b")
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)
    assert cli("bundle", "verify", tmp_path / "b", "--key", tmp_path / "key.pub").code == REFUSED
    assert cli("bundle", "sign", tmp_path / "b", "--key", tmp_path / "key.pem").code == OK
    assert cli("bundle", "verify", tmp_path / "b", "--key", tmp_path / "key.pub").code == OK
    assert cli("bundle", "verify", tmp_path / "b", "--key", tmp_path / "key.pem").code == USAGE
    signature = json.loads((tmp_path / "b" / "model.sig").read_text())
    payload = base64.b64decode(signature["dsseEnvelope"]["payload"]).replace(b"model.onnx", b"model.xnno")
    signature["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    (tmp_path / "b" / "model.sig").write_text(json.dumps(signature))
    assert cli("bundle", "verify", tmp_path / "b", "--key", tmp_path / "key.pub").code == REFUSED


def test_build_from_a_toml_spec_and_validate(cli: Cli, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_bytes())
    for variant in manifest["variants"]:
        variant["files"] = [file["path"] for file in variant["files"]]
    spec = tmp_path / "b" / "spec.toml"
    (tmp_path / "b" / "all.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "version"}))
    spec.write_text('version = "1.2.3"\ninclude = ["all.json"]\n')
    done = cli("bundle", "build", spec, "--out", tmp_path / "made", "--json")
    assert (done.code, done.json()["version"]) == (OK, "1.2.3")
    report = cli("bundle", "validate", tmp_path / "made", "--json")
    assert report.code == OK and report.json()["ok"]
    assert cli("bundle", "build", spec, "--out", tmp_path / "made").code == USAGE


def test_two_approvers_sign_one_after_the_other(cli: Cli, tmp_path: Path) -> None:
    second = ServerRig(tmp_path / "two").start()
    try:
        own = {
            "SKERRY_SERVER": second.ready["url"],
            "SKERRY_TOKEN": (second.data / "admin.token").read_text().strip(),
            "SKERRY_CA": str(second.data / "ca" / "ca.pem"),
            "SKERRY_KEYS": str(tmp_path / "keys"),
            "SKERRY_KEY_PASSWORD": "correct horse",
        }
        two = Cli(tmp_path, own)
        ceremony = (
            "keys",
            "init",
            "--dir",
            tmp_path / "keys",
            "--approver",
            "ada",
            "--approver",
            "bob",
            "--threshold",
            "2",
        )
        assert two(*ceremony, "--publish").code == OK
        models.build_bundle(tmp_path / "b", model="gas")
        assert two("push", tmp_path / "b").code == OK
        proposal = tmp_path / "proposal.json"
        first = two(
            *("approve", "gas@1.0.0", "--from", tmp_path / "b", "--as", "ada", "--with", "bob"),
            *("--proposal", proposal, "--yes", "--json"),
        )
        assert first.code == OK and not first.json()["posted"]
        assert two("approve", "--cosign", proposal, "--as", "bob", "--yes", SKERRY_KEY_PASSWORD="wrong").code == USAGE
        # A script has to say what it expects: whoever holds ada's key alone gets nothing signed by bob's.
        blind = two("approve", "--cosign", proposal, "--as", "bob", "--yes")
        assert blind.code == REFUSED and "nobody looks at what comes in" in blind.err
        other = two("approve", "--cosign", proposal, "--as", "bob", "--yes", "--expect", "ab" * 32)
        assert other.code == REFUSED and "--expect says" in other.err
        digest = canonical.sha256((tmp_path / "b" / "manifest.json").read_bytes())
        done = two("approve", "--cosign", proposal, "--as", "bob", "--yes", "--expect", digest, "--json")
        assert done.code == OK and done.json()["posted"] and done.json()["signatures"] == 2
        assert two("approve", "--cosign", proposal, "--as", "ada", "--yes").code == REFUSED
    finally:
        second.close()


def test_a_device_is_asked_why(cli: Cli, server: ServerRig, tmp_path: Path) -> None:
    assert cli("group", "create", "asked").code == OK
    device = DeviceRig(server, "asked-1", tmp_path, group="asked")
    device.enrol()
    nothing = cli("device", "why", "asked-1")
    assert nothing.code == OK, nothing.err
    assert "asked-1 in group asked: offline, never heard of" in nothing.out
    assert "Group asked runs no model" in nothing.out

    folder = tmp_path / "wind"
    digest = models.build_bundle(folder, model="wind", version="1.0.0")
    assert cli("push", folder).code == OK
    assert cli("approve", digest, "--yes", "--from", folder).code == OK
    server.good("PUT", "/api/v1/groups/asked/models/wind", {"stable": digest})
    device.connect()
    try:
        device.report()
        data = {"model": "wind", "digest": digest, "state": "idle", "failed_in": "verify", "detail": "[bold]model.onnx"}
        event = wire.Event(at=w.Instant("b" * 32, 1, 1, True), name="update", code="hash_mismatch", data=data)
        device.send(("event", wire.encode(event)))
        server.wait("its word", lambda: "refused" in cli("device", "why", "asked-1").out)
        found = cli("device", "why", "asked-1", "--json").json()
        (one,) = found["models"]
        assert (one["state"], one["assigned"]["version"], one["running"]) == ("refused", "1.0.0", None)
        told = cli("device", "why", "asked-1")
        assert told.code == OK
        lines = [line.strip() for line in told.out.splitlines()]
        assert any(line.startswith("wind: refused, since ") for line in lines)
        assert "should run: wind 1.0.0: what group asked runs" in lines
        assert "runs:       nothing of it" in lines
        # What a device says is text, never markup of the terminal.
        assert any("hash_mismatch: a file differs" in line and "([bold]model.onnx)" in line for line in lines)
        assert any(
            line.startswith("evidence:   audit ") and f"events {one['failure']['event']}" in line for line in lines
        )
        assert any(line.startswith("how far behind: group document 0 of 2") for line in lines)
    finally:
        device.disconnect()

    unknown = cli("device", "why", "nobody")
    assert unknown.code == USAGE and "not_found" in unknown.err and "nobody" in unknown.err, unknown.err
    assert cli("device", "show", "nobody").code == unknown.code
    assert cli("device", "why").code == USAGE


def test_an_approver_who_asks_for_signed_bundles_approves_no_other(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "signed"
    digest = models.build_bundle(folder, model="signed", version="1.0.0")
    for name in ("ci", "stranger"):
        keyring.make_file_key(tmp_path / "signers", name, key_type="ecdsa", password=None)
    wanted = {"SKERRY_MODEL_SIGNERS": str(tmp_path / "signers" / "ci.pub.json")}
    assert cli("push", folder).code == OK
    bare = cli("approve", digest, "--yes", **wanted)
    assert bare.code == REFUSED and "no model.sig; wanted one by ci" in bare.err
    # The register holds a signature from now on, of another key: it is not believed.
    signing.sign(read_bundle(folder), tmp_path / "signers" / "stranger.pem")
    assert cli("push", folder).code == OK
    foreign = cli("approve", digest, "--yes", **wanted)
    assert foreign.code == REFUSED and "holds under none of ci" in foreign.err
    signing.sign(read_bundle(folder), tmp_path / "signers" / "ci.pem")
    good = cli("approve", digest, "--yes", "--json", "--from", folder, **wanted)
    assert good.code == OK and "its files were signed by ci" in good.err


def test_a_model_that_must_be_encrypted_is_neither_pushed_nor_approved_in_the_clear(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    digest = models.build_bundle(folder, model="bare", version="1.0.0")
    asked = {"SKERRY_ENCRYPTED_MODELS": "other bare"}
    refused = cli("push", folder, "--clear", **asked)
    assert refused.code == REFUSED and "bare@1.0.0 is in the clear" in refused.err and "--encrypt" in refused.err
    # Somebody else, or a server of a thief's, has it all the same: the approver's own list counts.
    assert cli("push", folder).code == OK
    for how in ((), ("--from", folder)):
        refused = cli("approve", digest, "--yes", *how, **asked)
        assert refused.code == REFUSED and "bare@1.0.0 is in the clear" in refused.err, refused.err


def test_a_place_without_keys_of_signers_is_no_list_of_them(tmp_path: Path) -> None:
    with pytest.raises(Usage, match=r"\*\.pem or \*\.pub\.json"):
        model_signers.read(tmp_path)
    (tmp_path / "x.pem").write_text("no key")
    with pytest.raises(Usage, match=r"x\.pem: .*wanted the public key"):
        model_signers.read(tmp_path)
