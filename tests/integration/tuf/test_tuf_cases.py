"""The attacks and odd cases of TUF's specification, on the updater that devices run. docs/explanation/attacks-and-tests.md says which
cases of the public conformance suite each stands for; the suite itself is run by hand on ``tests/system/tuf_conformance_client``.
"""

import datetime as dt
import json
from urllib.parse import quote

import pytest
from securesystemslib.signer import CryptoSigner
from skerry_agent.courier.safe_updater import SafeUpdater
from tuf.api import exceptions as e
from tuf.api.metadata import MetaFile, TargetFile

from tests.integration.tuf.shelf import KEYS, LATER, TOP, Client, Repo

PAST = dt.datetime.now(dt.UTC).replace(microsecond=0) - dt.timedelta(days=2)
ALL = ("root", "targets", "snapshot", "timestamp")


@pytest.fixture
def repo():
    return Repo()


@pytest.fixture
def client(repo, tmp_path):
    return Client(repo, tmp_path / "tuf")


def refused(client, kind=e.RepositoryError, *, look="", days=0):
    with pytest.raises(kind) as caught:
        updater = client.refresh(days=days)
        if look:
            updater.get_targetinfo(look)
    return str(caught.value)


def test_the_files_that_are_kept_are_the_bytes_that_came(repo, client):
    repo.shelf.files["metadata/timestamp.json"] += b" \n"
    client.refresh()
    assert client.trusted() == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}
    assert (client.folder / "timestamp.json").read_bytes() == repo.file("timestamp.json")
    assert repo.shelf.asked == [
        "metadata/2.root.json", "metadata/timestamp.json", "metadata/1.snapshot.json", "metadata/1.targets.json",
    ]  # fmt: skip
    repo.shelf.asked.clear()
    client.refresh()
    assert repo.shelf.asked == ["metadata/2.root.json", "metadata/timestamp.json"]


@pytest.mark.parametrize(
    "spoil", [lambda v: v["signed"].pop("version"), lambda v: v["signatures"][0].update(sig="00" * 64)]
)
def test_a_first_root_that_is_wrong_is_refused_before_anything_is_asked(repo, client, spoil):
    repo.edit("1.root.json", spoil)
    client.root = repo.file("1.root.json")
    with pytest.raises(e.RepositoryError):
        client.updater()
    assert repo.shelf.asked == []


BEFORE = {
    "root": {"root": 1},
    "timestamp": {"root": 2},
    "snapshot": {"root": 2, "timestamp": 2},
    "targets": {"root": 2, "timestamp": 2, "snapshot": 2},
}


@pytest.mark.parametrize("role", BEFORE)
def test_a_role_that_its_keys_did_not_sign_is_not_taken_and_what_came_before_it_is(repo, client, role):
    repo.signers[role] = [KEYS[9]]
    repo.publish(*ALL)
    refused(client, e.UnsignedMetadataError)
    assert client.trusted() == BEFORE[role]


@pytest.mark.parametrize("role", ["root", "snapshot", "targets"])
def test_a_version_under_another_versions_name_is_not_taken(repo, client, role):
    repo.publish(*ALL)
    repo.signed[role].version += 1
    repo.shelf.files[repo.path(role, 2)] = repo.sign(role)
    refused(client, e.BadVersionNumberError)
    assert client.trusted() == BEFORE[role]


@pytest.mark.parametrize("hashes", [False, True])
@pytest.mark.parametrize("role", TOP)
def test_a_role_does_not_go_back(repo, client, role, hashes):
    repo.hashes = hashes
    repo.publish("targets", "snapshot", "timestamp")
    client.refresh()
    repo.signed[role].version = 0
    repo.publish(role)
    if role == "targets":
        repo.publish("snapshot")
    if role != "timestamp":
        repo.publish("timestamp")
    refused(client, e.BadVersionNumberError)
    assert client.trusted()[role] == 2


def test_a_timestamp_that_changed_under_its_version_is_passed_over(repo, client):
    client.refresh()
    repo.timestamp.snapshot_meta = MetaFile(100)
    repo.shelf.files["metadata/timestamp.json"] = repo.sign("timestamp")
    client.refresh()
    assert "metadata/100.snapshot.json" not in repo.shelf.asked


@pytest.mark.parametrize(("role", "kept"), [("snapshot", "targets"), ("timestamp", "snapshot")])
def test_metadata_of_another_hash_than_is_listed_is_not_taken(repo, client, role, kept):
    repo.hashes = True
    repo.publish("targets", "snapshot", "timestamp")
    client.refresh()
    repo.publish("targets", "snapshot")
    lister = repo.timestamp.snapshot_meta if role == "timestamp" else repo.snapshot.meta["targets.json"]
    lister.hashes["sha256"] = "0" * 64
    if role == "snapshot":
        repo.publish("snapshot")
    repo.publish("timestamp")
    refused(client, e.LengthOrHashMismatchError)
    assert client.trusted()[kept] == 2


@pytest.mark.parametrize("role", TOP)
def test_a_missing_role_leaves_what_was_trusted(repo, client, role):
    client.refresh()
    repo.publish("targets", "snapshot", "timestamp")
    del repo.shelf.files[repo.path(role, 2)]
    refused(client, e.DownloadHTTPError)
    assert client.trusted()[role] == 1


@pytest.mark.parametrize("role", TOP)
def test_an_expired_role_is_not_taken_and_the_refusal_says_which_time_it_is(repo, client, role):
    client.refresh()
    repo.signed[role].expires = PAST
    repo.publish(*(one for one in ("targets", "snapshot", "timestamp") if TOP.index(one) <= TOP.index(role)))
    said = refused(client, e.ExpiredMetadataError)
    assert f"it is taken to be {dt.datetime.now(dt.UTC):%Y-%m-%d}" in said
    assert "this device's clock" in said
    assert client.trusted()[role] == 1


def test_an_old_cache_is_only_a_step_to_newer_metadata(repo, client):
    for signed in (repo.timestamp, repo.snapshot, repo.targets):
        signed.expires = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(days=7)
    repo.publish("targets", "snapshot", "timestamp")
    client.refresh()
    for signed in (repo.timestamp, repo.snapshot, repo.targets):
        signed.expires = LATER
    repo.publish("targets", "snapshot", "timestamp")
    client.refresh(days=18)
    assert client.trusted() == {"root": 1, "timestamp": 3, "snapshot": 3, "targets": 3}
    repo.publish("timestamp")
    repo.timestamp.version = 1
    repo.shelf.files["metadata/timestamp.json"] = repo.sign("timestamp")
    # Even an expired one is what a rollback is judged by.
    refused(client, e.BadVersionNumberError, days=18)


# --- versions that a thief ran ahead, and how the operator gets them back ---


@pytest.mark.parametrize(
    ("role", "rotated"),
    [("timestamp", ("timestamp",)), ("snapshot", ("snapshot", "timestamp")), ("targets", ("snapshot",))],
)
def test_versions_that_ran_ahead_come_back_with_new_keys(repo, client, role, rotated):
    repo.delegate("sub")
    repo.publish("sub")
    repo.signed[role].version = 98
    repo.publish("targets", "snapshot", "timestamp")
    client.refresh()
    assert client.trusted()[role] == 99
    repo.signed[role].version = 0
    # Without new keys it is a rollback.
    repo.publish("targets", "snapshot", "timestamp")
    refused(client, e.BadVersionNumberError)
    for n, one in enumerate(rotated):
        repo.name(one, KEYS[10 - n])
    repo.signed[role].version = 0
    if role == "targets":
        del repo.snapshot.meta["sub.json"]
    repo.publish("root", "targets", "snapshot", "timestamp")
    client.refresh()
    assert client.trusted()[role] == 1


class Held(SafeUpdater):
    held_roles = ("targets",)


def test_a_held_role_comes_back_only_with_a_new_key_of_its_own(repo, tmp_path):
    client = Client(repo, tmp_path / "tuf", Held)
    repo.targets.version = 98
    repo.publish("targets", "snapshot", "timestamp")
    client.refresh()
    repo.name("snapshot", KEYS[10])
    repo.targets.version = 0
    repo.publish("root", "targets", "snapshot", "timestamp")
    assert "99 was seen" in refused(client, e.BadVersionNumberError)
    repo.name("targets", KEYS[11])
    repo.targets.version = 0
    repo.publish("root", "targets", "snapshot", "timestamp")
    client.refresh()
    assert client.trusted()["targets"] == 1


def test_a_role_does_not_disappear_from_the_snapshot(repo, client):
    repo.delegate("sub")
    repo.publish("sub", "targets", "snapshot", "timestamp")
    client.refresh()
    del repo.snapshot.meta["sub.json"]
    repo.publish("snapshot", "timestamp")
    assert "missing info" in refused(client)


# --- roots ---


@pytest.mark.parametrize(
    ("versions", "ok"),
    [
        ([((1,), 1, (1,)), ((2,), 1, (2, 1)), ((2,), 1, (2,))], True),
        ([((1,), 1, (3, 1, 4)), ((2,), 1, (3, 2, 1, 4)), ((2,), 1, (3, 2, 4))], True),
        ([((0, 1, 2, 3, 4), 3, (0, 2, 4)), ((0, 1, 2, 3, 4), 3, (0, 4, 1)), ((0, 1, 3, 4, 5), 3, (0, 4, 1))], True),
        ([((0, 1, 2), 2, (0, 2)), ((5, 6, 7), 2, (0, 2, 5, 6)), ((5, 6, 7), 2, (5, 7))], True),
        ([((1, 2, 3), 1, (1,)), ((1, 2, 3), 2, (1, 2))], True),
        ([((1, 2, 3), 2, (1, 2)), ((1, 2, 3), 1, (1, 2)), ((1, 2, 3), 1, (1,))], True),
        ([((1,), 1, (1,)), ((2,), 1, (2, 3))], False),
        ([((1,), 1, (1,)), ((2,), 1, (1, 3))], False),
        ([((0, 1, 2, 3, 4), 3, (0, 2, 4)), ((0, 1, 3, 4, 5), 3, (0, 2, 4))], False),
        ([((0, 1, 2, 3, 4), 3, (0, 2, 4)), ((0, 1, 3, 4, 5), 3, (0, 4, 5))], False),
        ([((1, 2, 3), 1, (1,)), ((1, 2, 3), 2, (2,))], False),
        ([((1, 2, 3), 2, (1, 2)), ((1, 2, 3), 1, (1,))], False),
    ],
)
def test_a_root_needs_the_threshold_of_the_one_before_it_and_of_its_own(repo, client, versions, ok):
    repo.root.version = 0
    for keys, threshold, signers in versions:
        repo.name("root", *(KEYS[n] for n in keys), threshold=threshold)
        repo.signers["root"] = [KEYS[n] for n in signers]
        repo.publish("root")
    client.root = repo.file("1.root.json")
    if ok:
        client.refresh()
        assert client.trusted()["root"] == len(versions)
    else:
        refused(client, e.UnsignedMetadataError)
        assert client.trusted() == {"root": len(versions) - 1}


def many_roots(repo, n, *, change=False):
    """Roots from 2 to ``n``; with ``change`` every key of every role is another in the end."""
    for version in range(2, n + 1):
        if change:
            old = repo.signers["root"]
            for m, role in enumerate(ALL):
                repo.name(role, KEYS[(version + 3 * m) % len(KEYS)])
            new = repo.signers["root"]
            repo.signers["root"] = [*old, *new]
            repo.publish("root")
            repo.signers["root"] = new
        else:
            repo.publish("root")
    repo.publish("targets", "snapshot", "timestamp")


def test_a_device_that_slept_through_ten_roots_and_all_keys_comes_back(repo, client):
    client.refresh()
    # All of them long expired but the last: a root in between is only a step.
    repo.root.expires = PAST
    many_roots(repo, 10, change=True)
    repo.root.expires = LATER
    repo.publish("root")
    client.refresh()
    assert client.trusted()["root"] == 11


def test_more_roots_than_tuf_follows_at_once_are_followed(repo, client):
    many_roots(repo, 14)
    client.refresh(max_root_rotations=4)
    assert client.trusted()["root"] == 14
    # And from the operator's root again, through the cache.
    repo.shelf.asked.clear()
    client.refresh(max_root_rotations=4)
    assert repo.shelf.asked == ["metadata/15.root.json", "metadata/timestamp.json"]


@pytest.mark.slow
def test_three_hundred_roots_are_followed(repo, client):
    many_roots(repo, 300)
    client.refresh()
    assert client.trusted()["root"] == 300


def test_a_gap_in_the_roots_is_named(repo, client):
    many_roots(repo, 4, change=True)
    del repo.shelf.files["metadata/3.root.json"]
    said = refused(client, e.UnsignedMetadataError)
    assert "root version 2" in said
    assert "3.root.json is missing" in said
    assert client.trusted() == {"root": 2}


def test_an_expired_last_root_says_what_is_wanted(repo, client):
    repo.root.expires = PAST
    repo.publish("root")
    said = refused(client, e.ExpiredMetadataError)
    assert f"root version 2, the newest that the repository offers after it, expired {PAST:%Y-%m-%d}" in said
    assert "3.root.json is wanted, signed with the root keys" in said
    assert said.count("it is taken to be") == 1


@pytest.mark.parametrize("status", [500, 503])
def test_a_root_that_cannot_be_asked_for_is_not_taken_for_the_last(repo, client, status):
    def away(url):
        raise e.DownloadHTTPError(f"{url}: HTTP {status}", status)
        yield b""

    repo.shelf._fetch = away
    refused(client, e.DownloadHTTPError)


def test_fields_that_nobody_knows_are_signed_and_kept(repo, client):
    repo.root.unrecognized_fields["later"] = {"a": 1}
    repo.publish("root")
    client.refresh()
    assert json.loads((client.folder / "root.json").read_bytes())["signed"]["later"] == {"a": 1}


# --- keys and signatures ---


@pytest.mark.parametrize(
    ("keys", "threshold", "signers", "ok"),
    [
        ((2,), 1, (2,), True), ((1,), 1, (3, 1, 4), True), ((0, 1, 2, 3, 4), 3, (4, 1, 3), True),
        ((2,), 1, (1, 3), False), ((0, 1, 3), 3, (0, 1, 2), False), ((0, 1), 3, (0, 1), False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("role", TOP)
def test_a_role_needs_its_threshold(repo, client, role, keys, threshold, signers, ok):
    repo.name(role, *(KEYS[n] for n in keys), threshold=threshold)
    repo.signers[role] = [KEYS[n] for n in signers]
    repo.publish(*ALL)
    if ok:
        client.refresh()
        assert client.trusted()[role] == 2
    else:
        refused(client, e.UnsignedMetadataError)
        assert role not in client.trusted()


def test_one_key_under_a_threshold_of_two_counts_once(repo, client):
    repo.name("snapshot", KEYS[1], KEYS[2], threshold=2)
    repo.signers["snapshot"] = [KEYS[1]]
    repo.publish(*ALL)
    repo.edit("2.snapshot.json", lambda value: value["signatures"].append(value["signatures"][0]))
    refused(client)
    assert "snapshot" not in client.trusted()


def test_two_signatures_of_one_key_are_no_metadata(repo, client):
    repo.edit("1.snapshot.json", lambda value: value["signatures"].append(value["signatures"][0]))
    refused(client)
    assert "snapshot" not in client.trusted()


@pytest.mark.parametrize("wrong", ["00" * 64, "", "not hex"])
def test_a_wrong_signature_beside_enough_right_ones_is_no_fault(repo, client, wrong):
    repo.name("timestamp", KEYS[1], KEYS[2])
    repo.publish("root", "timestamp")

    def spoil(value):
        signature = next(s for s in value["signatures"] if s["keyid"] == KEYS[1].public_key.keyid)
        signature["sig"] = wrong

    repo.edit("timestamp.json", spoil)
    client.refresh()
    repo.edit("timestamp.json", lambda value: [s.update(sig=wrong) for s in value["signatures"]])
    refused(client, e.UnsignedMetadataError)


@pytest.mark.parametrize(
    "make", [CryptoSigner.generate_ed25519, CryptoSigner.generate_ecdsa, CryptoSigner.generate_rsa]
)
def test_keys_of_every_usual_kind_count_and_their_wrong_signatures_do_not(repo, client, make):
    repo.name("timestamp", make())
    repo.publish("root", "timestamp")
    client.refresh()
    repo.publish("timestamp")
    good = json.loads(repo.file("timestamp.json"))["signatures"][0]["sig"]
    repo.edit("timestamp.json", lambda value: value["signatures"][0].update(sig=good[:-8] + "00000000"))
    refused(client, e.UnsignedMetadataError)


@pytest.mark.parametrize(
    "kind", [("rsa", "rsassa-pss-sha256"), ("ecdsa", "ecdsa-sha2-nistp256"), ("ed25519", "none"), ("x", "y")]
)
def test_a_key_that_is_said_to_be_of_another_kind_signs_nothing(repo, client, kind):
    repo.publish("root", "timestamp")
    key = KEYS[7]
    repo.name("timestamp", key)
    public = repo.root.keys[key.public_key.keyid]
    before = public.keytype, public.scheme
    try:
        public.keytype, public.scheme = kind
        repo.publish("root", "timestamp")
    finally:
        public.keytype, public.scheme = before
    refused(client)
    assert "timestamp" not in client.trusted()


def test_a_snapshot_is_no_timestamp_though_the_same_key_signed_it(repo, client):
    repo.name("snapshot", repo.signers["timestamp"][0])
    repo.snapshot.meta = {"snapshot.json": MetaFile(1)}
    repo.publish("root", "snapshot")
    repo.shelf.files["metadata/timestamp.json"] = repo.file("2.snapshot.json")
    refused(client)
    assert client.trusted() == {"root": 2}


# --- delegations ---


@pytest.mark.parametrize(
    ("edges", "order"),
    [
        ([("targets", "A")], "A"),
        ([("targets", "A"), ("targets", "B"), ("B", "C")], "ABC"),
        ([("targets", "A"), ("targets", "B"), ("A", "C"), ("A", "D")], "ACDB"),
        ([("targets", "A"), ("targets", "B"), ("A", "C"), ("C", "D")], "ACDB"),
        ([("targets", "A"), ("targets", "B"), ("A", "C!"), ("A", "D")], "AC"),
        ([("targets", "A"), ("targets", "B"), ("A", "C!"), ("C", "D")], "ACD"),
        ([("targets", "A", "*.py"), ("targets", "B"), ("A", "C")], "B"),
        ([("targets", "A"), ("targets", "B"), ("A", "C", "*.py"), ("C", "D")], "AB"),
        ([("targets", "A"), ("targets", "B"), ("B", "C"), ("C", "D"), ("D", "B")], "ABCD"),
        ([("targets", "A"), ("targets", "B"), ("B", "C"), ("A", "C")], "ACB"),
        ([("targets", "A"), ("targets", "B"), ("B", "C"), ("A", "C", "*.py")], "ABC"),
    ],
)
def test_delegations_are_walked_depth_first_in_their_order(repo, client, edges, order):
    for by, role, *paths in edges:
        repo.delegate(role[0], by=by, paths=tuple(paths) or ("*",), terminating=role.endswith("!"))
    repo.publish(*dict.fromkeys(edge[1][0] for edge in edges), "targets", "snapshot", "timestamp")
    assert client.refresh().get_targetinfo("missing") is None
    assert [path.split(".")[1] for path in repo.shelf.asked[4:]] == list(order)


@pytest.mark.parametrize(
    ("path", "by"),
    [
        ("README.md", "A"), ("foo-1.tgz", "A"), ("releases/x/v1", "C"), ("foo-alpha.tgz", None),
        ("releases/README.md", None), ("README.MD", None), ("releases/z/v1", None),
    ],
)  # fmt: skip
def test_a_role_speaks_only_for_the_paths_that_every_role_above_gave_it(repo, client, path, by):
    repo.delegate("A", paths=("*.md", "foo-?.tgz"))
    repo.delegate("B", paths=("releases/*/*",))
    repo.delegate("C", by="B", paths=("releases/x/*",))
    for role in "ABC":
        # Each claims all of them.
        repo.signed[role].targets[path] = TargetFile.from_data(path, role.encode(), ["sha256"])
    repo.signed["B"].targets.clear()
    repo.publish("A", "B", "C", "targets", "snapshot", "timestamp")
    info = client.refresh().get_targetinfo(path)
    assert (info is None) == (by is None)
    if by is not None:
        assert info == repo.signed[by].targets[path]


def test_a_role_that_is_cached_is_judged_by_whoever_delegates_to_it_now(repo, client):
    for name, key in (("a", 4), ("b", 5)):
        repo.delegate(name, paths=(f"{name}/*",))
        repo.delegate("shared", by=name, paths=(f"{name}/*",), key=key)
        path = f"{name}/file"
        repo.shared.targets[path] = TargetFile.from_data(path, b"x", ["sha256"])
    # Right for a, forged for b.
    repo.signers["shared"] = [KEYS[4]]
    repo.publish("shared", "a", "b", "targets", "snapshot", "timestamp")
    updater = client.refresh()
    assert updater.get_targetinfo("a/file") is not None
    with pytest.raises(e.UnsignedMetadataError):
        updater.get_targetinfo("b/file")


def test_a_delegation_that_the_snapshot_does_not_list_is_not_even_asked_for(repo, client):
    repo.delegate("sub")
    repo.publish("sub", "targets")
    del repo.snapshot.meta["sub.json"]
    repo.publish("snapshot", "timestamp")
    assert "not part of snapshot" in refused(client, look="x")
    assert not [path for path in repo.shelf.asked if "sub" in path]


@pytest.mark.parametrize("spoil", ["unsigned", "rolled back", "expired", "misnamed"])
def test_a_delegated_role_is_judged_as_the_others_are(repo, client, spoil):
    sub = repo.delegate("sub")
    repo.publish("sub", "sub", "targets", "snapshot", "timestamp")
    client.refresh().get_targetinfo("x")
    assert client.trusted()["sub"] == 2
    if spoil == "unsigned":
        repo.signers["sub"] = [KEYS[9]]
    elif spoil == "expired":
        sub.expires = PAST
    elif spoil == "rolled back":
        sub.version = 0
    repo.publish("sub")
    if spoil == "misnamed":
        sub.version = 9
        repo.shelf.files["metadata/3.sub.json"] = repo.sign("sub")
    repo.publish("snapshot", "timestamp")
    refused(client, look="x")
    assert client.trusted()["sub"] == 2


@pytest.mark.parametrize("name", ["?", "#", "/sub", "../sub", "a b", "%2e%2e", "é"])
def test_a_strange_name_of_a_role_is_quoted_and_leaves_no_folder(repo, client, name):
    repo.delegate(name)
    repo.signed[name].version = 1
    repo.publish(name, "targets", "snapshot", "timestamp")
    repo.shelf.files[f"metadata/1.{quote(name, '')}.json"] = repo.sign(name)
    assert client.refresh().get_targetinfo("x") is None
    assert f"metadata/1.{quote(name, '')}.json" in repo.shelf.asked
    assert set(client.trusted()) == {"root", "timestamp", "snapshot", "targets", name}
    assert {path.parent for path in client.folder.parent.rglob("*.json")} == {
        client.folder,
        client.folder / "root_history",
    }


# --- documents ---


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"other", e.LengthOrHashMismatchError),
        (b"short", e.LengthOrHashMismatchError),
        (b"much longer", e.DownloadLengthMismatchError),
    ],
)
def test_a_target_of_another_content_or_length_is_refused(repo, client, data, kind):
    repo.targets.targets["d/t"] = TargetFile.from_data("d/t", b"right!" if data == b"short" else b"right", ["sha256"])
    repo.publish("targets", "snapshot", "timestamp")
    updater = client.refresh()
    info = updater.get_targetinfo("d/t")
    repo.shelf.files[updater.target_url(info).removeprefix("https://here/")] = data
    with pytest.raises(kind):
        updater.fetch_target(info, 100)
    with pytest.raises(e.LengthOrHashMismatchError):
        updater.fetch_target(info, 3)


@pytest.mark.parametrize(
    ("consistent", "hashes", "wanted"),
    [(True, ["sha256", "sha512"], "d/{sha256}.t"), (True, ["sha512"], "d/{sha512}.t"), (False, ["sha256"], "d/t")],
)
def test_a_target_lies_where_a_consistent_snapshot_puts_it(repo, client, consistent, hashes, wanted):
    info = repo.targets.targets["d/t"] = TargetFile.from_data("d/t", b"x", hashes)
    repo.root.consistent_snapshot = consistent
    repo.publish("root", "targets", "snapshot", "timestamp")
    for role in ("snapshot", "targets"):
        repo.shelf.files[f"metadata/{role}.json"] = repo.file(f"2.{role}.json")
    updater = client.refresh()
    assert updater.target_url(updater.get_targetinfo("d/t")) == "https://here/targets/" + wanted.format(**info.hashes)
