"""Writing an update into a folder: what an operator's machine does for whoever holds the server, or had the stick."""

import datetime as dt
import json
import os

import pytest
from skerry_cli import exporting
from skerry_cli.client import Api
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_cli.profile import Profile
from skerry_contract import group, layout
from tuf.api.metadata import MetaFile, Root, TargetFile

from tests.integration.tuf.conftest import Bundle, Fleet

EVIL = b"import os; os.system('true')\n"


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """One fleet with a bundle that is approved and that the group runs."""
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    bundle = Bundle("gas", "1.0.0")
    made.approve(bundle)
    target = group.Target(version="1.0.0", digest=bundle.digest)
    models = {"gas": group.ModelPlan(stable=target)}
    document = group.GroupDocument(schema=1, group="line-1", generation=1, models=models)
    made.repository.publish_group("line-1", group.encode(document))
    yield made
    made.site.close()


@pytest.fixture
def fleet(honest):
    """The same for each test, whatever the one before did to it."""
    kept = {path: path.read_bytes() for path in honest.path.rglob("*") if path.is_file()}
    honest.site.asked.clear()
    yield honest
    honest.site.folder, honest.site.get = honest.path, type(honest.site).get.__get__(honest.site)
    honest.site.spoils.clear()
    for path in [path for path in honest.path.rglob("*") if path.is_file() and path not in kept]:
        path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)


@pytest.fixture
def bundle(fleet):
    return next(iter(fleet.bundles.values()))


@pytest.fixture
def export(fleet, tmp_path):
    """The tool's own work, with its own client."""

    def run(folder, *groups, say=lambda _: None, later=dt.timedelta()):
        api = Api(Profile(server=fleet.site.url, token="secret", ca=fleet.authority.files.ca))
        return exporting.export(
            api, folder, root=fleet.ceremony.root, cache_dir=tmp_path / "seen" / "catalog", now=fleet.clock() + later,
            groups=groups, say=say,
        )  # fmt: skip

    return run


def steal(fleet, change):
    """Whoever holds the online key changes the list of groups, and what vouches for it."""
    newest = {
        role: max(int(path.name.split(".")[0]) for path in fleet.metadata_file("").glob(f"*.{role}.json"))
        for role in ("fleet", "snapshot")
    }

    def further(signed):
        change(signed)
        signed.version = newest["fleet"] + 1

    def names_fleet(signed):
        signed.meta["fleet.json"] = MetaFile(newest["fleet"] + 1)
        signed.version += 1

    def names_snapshot(signed):
        signed.snapshot_meta = MetaFile(newest["snapshot"] + 1)
        signed.version += 1

    for role, edit in (("fleet", further), ("snapshot", names_fleet)):
        data = fleet.resign(f"{newest[role]}.{role}.json", fleet.online, edit)
        fleet.metadata_file(f"{newest[role] + 1}.{role}.json").write_bytes(data)
    fleet.metadata_file("timestamp.json").write_bytes(fleet.resign("timestamp.json", fleet.online, names_snapshot))


def all_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.attack("path traversal")
def test_a_listed_name_that_is_no_groups_writes_nothing_on_the_operators_machine(
    fleet, bundle, export, tmp_path
) -> None:
    for place in (tmp_path / "venv" / "site-packages", tmp_path / "media" / "stick"):
        place.mkdir(parents=True)
    # Its bytes are there for whoever asks, wherever the name leads.
    fleet.site.spoils["/repository/targets/"] = lambda handler, _: fleet.site.send_file(handler, EVIL) is None
    stick = tmp_path / "media" / "stick" / "update"
    for path in (
        "fleet/../../../../venv/site-packages/x.pth",
        "fleet/../x.json",
        "../x.json",
        "fleet/press.pth",
        "fleet/a/press.json",
        "/etc/cron.d/press.json",
    ):
        listed = TargetFile.from_data(path, EVIL, ["sha256"])
        steal(fleet, lambda signed, path=path, listed=listed: setattr(signed, "targets", {path: listed}))
        with pytest.raises(RefusedForSafety, match="is no group document's path"):
            export(stick)
        assert all_files(tmp_path / "venv") == all_files(tmp_path / "media") == {}


@pytest.mark.attack("arbitrary software")
def test_what_the_operators_root_does_not_vouch_for_is_not_written(fleet, bundle, export, make_fleet, tmp_path) -> None:
    stranger = make_fleet("stranger")
    stranger.repository.publish_group("line-1", stranger.document())
    fleet.site.folder = stranger.path
    with pytest.raises(RefusedForSafety, match="UnsignedMetadataError"):
        export(tmp_path / "stick")
    assert all_files(tmp_path / "stick") == {}


@pytest.mark.attack("rollback of metadata")
def test_an_older_repository_than_this_operator_has_seen_is_not_carried(fleet, bundle, export, tmp_path) -> None:
    old = fleet.metadata_file("timestamp.json").read_bytes()
    fleet.repository.publish_group("line-1", fleet.document(2))
    export(tmp_path / "first")
    fleet.metadata_file("timestamp.json").write_bytes(old)
    with pytest.raises(RefusedForSafety, match="BadVersionNumberError"):
        export(tmp_path / "second")


@pytest.mark.attack("endless data")
def test_roots_without_end_fill_no_stick(fleet, bundle, export, tmp_path) -> None:
    asked = fleet.site.asked
    before = fleet.site.get

    def endless(handler):
        if handler.path.endswith(".root.json") and len(asked) < 300:
            asked.append(handler.path)
            number = int(handler.path.rpartition("/")[2].split(".")[0])
            root = Root.from_dict({**json.loads(fleet.ceremony.root)["signed"], "version": number})
            return fleet.site.send_file(handler, json.dumps({"signatures": [], "signed": root.to_dict()}).encode())
        return before(handler)

    fleet.site.get = endless
    with pytest.raises(RefusedForSafety):
        export(tmp_path / "stick")
    assert [path for path in asked if path.endswith(".root.json")] == ["/repository/metadata/2.root.json"]
    assert all_files(tmp_path / "stick") == {}


@pytest.mark.attack("freeze")
def test_a_repository_that_nobody_signed_for_days_is_not_carried(fleet, bundle, export, tmp_path) -> None:
    with pytest.raises(RefusedForSafety, match="ExpiredMetadataError"):
        export(tmp_path / "stick", later=dt.timedelta(days=2))
    assert all_files(tmp_path / "stick") == {}


@pytest.mark.attack("endless data")
def test_a_file_without_end_is_cut_off_at_its_signed_size(fleet, bundle, export, tmp_path) -> None:
    sent, most = [0], 64 << 20

    def endless(handler, _data):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while sent[0] < most:
            handler.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            sent[0] += 0x10000
        return True

    fleet.site.spoils["/repository/blobs/"] = endless
    with pytest.raises(RefusedForSafety, match="not what its name says"):
        export(tmp_path / "stick")
    assert sent[0] < most / 2
    assert not list((tmp_path / "stick").rglob("blobs/*/*/*"))


def test_documents_that_are_not_what_is_listed_are_neither_carried_nor_followed(
    fleet, bundle, export, tmp_path
) -> None:
    def changed(handler, data):
        return fleet.site.send_file(handler, data.replace(b'"generation":1', b'"generation":2')) is None

    fleet.site.spoils["/repository/targets/fleet/"] = changed
    with pytest.raises(RefusedForSafety, match="sha256"):
        export(tmp_path / "stick")
    assert all_files(tmp_path / "stick") == {}
    fleet.site.spoils.clear()
    # Under the online key, a version by another digest than the approvers listed.
    other = group.Target(version="1.0.0", digest="0" * 64)
    document = group.GroupDocument(
        schema=1, group="line-1", generation=2, models={"gas": group.ModelPlan(stable=other)}
    )
    fleet.repository.publish_group("line-1", group.encode(document))
    done = export(tmp_path / "stick")
    assert [(one["model"], one["version"]) for one in done.missing] == [("gas", "1.0.0")]
    assert done.bundles == [] and not [path for path in all_files(tmp_path / "stick") if path.startswith("blobs/")]


@pytest.mark.attack("symlink")
def test_a_link_on_a_stick_that_comes_back_leads_nowhere(fleet, bundle, export, tmp_path) -> None:
    stick, home = tmp_path / "stick", tmp_path / "home"
    (home / "keys").mkdir(parents=True)
    (home / "keys" / "root.pem").write_text("secret")
    (home / "thesis.txt").write_text("years")
    export(stick)
    for link in ("blobs", "metadata", "targets", "blobs/sha256", "metadata/timestamp.json", "skerry-update.json"):
        place = stick / link
        target = home if place.is_dir() else home / "thesis.txt"
        os.rename(place, tmp_path / "aside")
        place.symlink_to(target)
        before = all_files(home), all_files(stick)
        with pytest.raises(Usage, match=rf"folder_unsafe: {link} is a link"):
            export(stick)
        assert (all_files(home), all_files(stick)) == before
        place.unlink()
        os.rename(tmp_path / "aside", place)


@pytest.mark.attack("symlink")
def test_a_stick_that_is_itself_a_link_or_has_a_pipe_is_refused(fleet, bundle, export, tmp_path) -> None:
    export(tmp_path / "stick")
    (tmp_path / "link").symlink_to(tmp_path / "stick")
    with pytest.raises(Usage, match="no link to one"):
        export(tmp_path / "link")
    os.mkfifo(tmp_path / "stick" / "metadata" / "9.root.json")
    with pytest.raises(Usage, match="folder_unsafe"):
        export(tmp_path / "stick")


def test_only_what_an_export_wrote_is_removed_from_the_stick(fleet, bundle, export, tmp_path) -> None:
    stick, said = tmp_path / "stick", []
    export(stick)
    first = all_files(stick)
    assert f"{layout.blob(bundle.files[0]['sha256'])}" in first
    notes = {f"{place}/thesis.txt": b"years" for place in ("blobs", "blobs/sha256", "targets", "metadata")}
    left_over = "blobs/sha256/aa/" + "a" * 64
    for path, data in {**notes, left_over: b"of another bundle", left_over + ".new": b"cut"}.items():
        (stick / path).parent.mkdir(exist_ok=True)
        (stick / path).write_bytes(data)
    done = export(stick, say=said.append)
    assert all_files(stick) == {**first, **notes}
    assert done.came == 0
    assert sorted(line for line in said if "thesis" in line) == sorted(
        f"{path!r} is of no export, and stays" for path in notes
    )
    assert not (stick / "blobs/sha256/aa").exists()


def test_a_damaged_file_on_the_stick_is_fetched_again_and_a_wrong_one_is_not_kept(
    fleet, bundle, export, tmp_path
) -> None:
    stick = tmp_path / "stick"
    export(stick)
    whole = all_files(stick)
    blob = layout.blob(bundle.files[-1]["sha256"])
    (stick / blob).write_bytes(b"x" * len(whole[blob]))
    fleet.site.spoils["/repository/blobs/"] = lambda handler, data: (
        fleet.site.send_file(handler, b"y" * len(data)) is None
    )
    with pytest.raises(RefusedForSafety, match="not what its name says"):
        export(stick)
    assert not list(stick.rglob("*.new"))
    fleet.site.spoils.clear()
    assert export(stick).came == len(whole[blob])
    assert all_files(stick) == whole
