"""What an approver signs: the named change to the last catalog of their own root, and nothing that the server made."""

import datetime as dt
import json

import pytest
from skerry_cli import catalog, key_files
from skerry_cli.errors import Failed, RefusedForSafety, Usage
from skerry_contract import layout
from skerry_server.db import migrations
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, sqlite_url, writing
from skerry_server.proposals import Proposals
from skerry_server.publication import Publication
from skerry_server.repository import RepositoryRefused
from sqlalchemy import update
from tuf.api.metadata import Metadata, TargetFile


@pytest.fixture
def gas(fleet, make_bundle):
    return fleet.push(make_bundle("gas", "1.0.0"))


def test_approval_changes_the_named_bundle_only_and_shows_it(fleet, gas):
    made = fleet.propose(catalog.Change(add=(gas.addition("bob"),), floors={"gas": "1.0.0"}))
    assert made.complete
    text = made.difference.text()
    assert f"+ gas@1.0.0  {gas.digest}" in text
    assert "submitted by bob, approved by ada" in text
    assert "floor of gas: none -> 1.0.0" in text
    assert json.loads(json.dumps(made.difference.to_json()))["added"][0]["digest"] == gas.digest
    fleet.install(made)
    (entry,) = fleet.repository.catalog_entries()
    assert (entry.digest, entry.custom) == (gas.digest, {"submitter": "bob", "approvers": ["ada"]})
    assert fleet.repository.floors() == {"gas": "1.0.0"}
    expires = fleet.verified().catalog.expires
    assert dt.timedelta(days=179) < expires - fleet.clock() <= dt.timedelta(days=180)


@pytest.mark.parametrize(
    "submitter", ["", "ci, approved by ada", "ci\n\n+ gas@1.0.0", "c\u202eid", "x" * 200_000, "Bob"]
)
def test_a_submitter_that_is_no_name_is_never_signed(fleet, gas, submitter):
    with pytest.raises(RefusedForSafety, match=r"add gas@1\.0\.0: its submitter is .* wanted a name"):
        fleet.propose(catalog.Change(add=(gas.addition(submitter),)))


def test_an_approver_that_is_no_name_is_never_signed(fleet, gas):
    with pytest.raises(RefusedForSafety, match=r"its approver is .* wanted a name"):
        fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea\n+ gas@9.9.9",))


def test_removal_takes_the_bundle_out(fleet, gas, make_bundle):
    fleet.approve(gas, make_bundle("gas", "1.1.0"))
    made = fleet.propose(catalog.Change(remove=(("gas", "1.0.0"),)))
    assert [entry.version for entry in made.difference.removed] == ["1.0.0"]
    fleet.install(made)
    assert [entry.version for entry in fleet.repository.catalog_entries()] == ["1.1.0"]


def test_flipped_byte_in_a_blob_is_never_signed(fleet, gas):
    sha256 = gas.files[1]["sha256"]
    path = fleet.path / "blobs" / "sha256" / sha256[:2] / sha256
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(RefusedForSafety, match=r"model\.onnx"):
        fleet.propose(catalog.Change(add=(gas.addition(),)))


def test_longer_and_missing_blobs_are_never_signed(fleet, gas):
    sha256 = gas.files[1]["sha256"]
    path = fleet.path / "blobs" / "sha256" / sha256[:2] / sha256
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(RefusedForSafety, match="wanted 7000"):
        fleet.propose(catalog.Change(add=(gas.addition(),)))
    path.unlink()
    with pytest.raises(Failed, match="404"):
        fleet.propose(catalog.Change(add=(gas.addition(),)))


def test_manifest_of_another_digest_or_name_is_never_signed(fleet, gas, make_bundle):
    other = fleet.push(make_bundle("gas", "2.0.0", weights=b"other"))
    fleet.bundles[gas.digest] = other
    with pytest.raises(RefusedForSafety, match="sha256"):
        fleet.propose(catalog.Change(add=(gas.addition(),)))
    wrong = catalog.Addition(model="gas", version="1.0.0", digest=other.digest, submitter="ci")
    with pytest.raises(RefusedForSafety, match=r"manifest is of gas@2\.0\.0"):
        fleet.propose(catalog.Change(add=(wrong,)))


def test_a_version_never_gets_a_second_digest(fleet, gas, make_bundle):
    fleet.approve(gas)
    second = fleet.push(make_bundle("gas", "1.0.0", weights=b"other"))
    with pytest.raises(RefusedForSafety, match="never changes"):
        fleet.propose(catalog.Change(add=(second.addition(),)))
    with pytest.raises(Usage, match="already"):
        fleet.propose(catalog.Change(add=(gas.addition(),)))


@pytest.mark.attack("rollback of a model")
def test_bundle_below_its_floor_and_a_lowered_floor_are_refused(fleet, gas):
    fleet.install(fleet.propose(catalog.Change(floors={"gas": "2.0.0"})))
    with pytest.raises(RefusedForSafety, match="below the floor"):
        fleet.propose(catalog.Change(add=(gas.addition(),)))
    for lower in ("1.0.0", None):
        with pytest.raises(RefusedForSafety, match="lowers it"):
            fleet.propose(catalog.Change(floors={"gas": lower}))
    made = fleet.propose(catalog.Change(floors={"gas": None}, lower_floors=True))
    assert "! floor of gas: 2.0.0 -> none" in made.difference.text()


@pytest.mark.attack("stolen server slips a bundle in")
def test_catalog_that_the_server_made_up_is_not_a_base_for_the_next(fleet, gas):
    current = Metadata.from_bytes(fleet.metadata_file("1.catalog.json").read_bytes())
    path = layout.manifest_target("gas", "6.6.6")
    current.signed.targets[path] = TargetFile.from_data(path, b"evil", ["sha256"])
    current.sign(fleet.online)
    data = current.to_bytes()
    fleet.metadata_file("1.catalog.json").write_bytes(data)
    fleet.repository._metadata.publish(fleet.repository._metadata.load())  # the server vouches for it with all it has
    with pytest.raises(RefusedForSafety, match="catalog was signed by 0/1"):
        fleet.propose(catalog.Change(add=(gas.addition(),)))


def test_server_with_another_root_is_refused(fleet, gas, make_fleet):
    other = make_fleet("other")
    with pytest.raises(RefusedForSafety):
        catalog.read_catalog(
            fleet.url,
            root=other.ceremony.root,
            cache_dir=fleet.folder / "cache-2",
            ca_file=fleet.authority.files.ca,
            now=fleet.clock(),
        )


def test_older_catalog_than_this_approver_has_seen_is_refused(fleet, gas, make_bundle):
    fleet.approve(gas)
    seen = fleet.verified().catalog.version
    folder = fleet.folder / "approver-cache"
    for name in ("snapshot.json", "timestamp.json"):
        (folder / name).unlink()
    # The stolen server goes back to version 1, signed rightly by the approvers once.
    state = fleet.repository._metadata.load()
    first = fleet.repository._metadata._read(layout.CATALOG_ROLE, 1, type(state.catalog.signed))
    from dataclasses import replace

    fleet.repository._metadata.publish(replace(state, catalog=first))
    with pytest.raises(RefusedForSafety, match=f"version 1, this operator has seen {seen}"):
        fleet.verified()


def test_unreachable_repository_is_a_failure_and_no_refusal(fleet):
    fleet.site.close()
    with pytest.raises(Failed):
        fleet.verified()


def test_untrusted_tls_is_a_failure(fleet, make_fleet):
    other = make_fleet("other")
    with pytest.raises(Failed, match=r"(?i)certificate"):
        catalog.read_catalog(
            fleet.url,
            root=fleet.ceremony.root,
            cache_dir=fleet.folder / "cache-2",
            ca_file=other.authority.files.ca,
            now=fleet.clock(),
        )


def test_key_that_targets_does_not_name_signs_nothing(fleet, gas):
    verified = fleet.verified()
    for name in ("root", "targets"):
        with pytest.raises(RefusedForSafety, match="not one of the approvers"):
            catalog.propose(
                verified,
                catalog.Change(add=(gas.addition(),)),
                source=fleet.source(),
                signer=fleet.signer(name),
                approvers=("ada",),
                now=fleet.clock(),
            )


def test_no_confirmation_no_signature(fleet, gas):
    shown = []
    with pytest.raises(RefusedForSafety, match="not confirmed"):
        catalog.propose(
            fleet.verified(),
            catalog.Change(add=(gas.addition(),)),
            source=fleet.source(),
            signer=fleet.signer("ada"),
            approvers=("ada",),
            now=fleet.clock(),
            confirm=lambda difference: bool(shown.append(difference)),
        )
    assert [entry.version for entry in shown[0].added] == ["1.0.0"]


def test_expired_catalog_can_be_renewed_and_says_so(fleet, gas, device):
    fleet.approve(gas)
    fleet.clock.ahead = dt.timedelta(days=200)
    fleet.repository.refresh_expiring()
    verified = fleet.verified()
    assert verified.expired
    made = fleet.propose(catalog.Change())
    assert "it had expired" in made.difference.text()
    fleet.install(made)
    assert not fleet.verified().expired


def test_local_build_is_accepted_as_the_source(fleet, gas, tmp_path):
    for file in gas.files:
        path = tmp_path / "build" / file["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gas.blobs[file["sha256"]])
    (tmp_path / "build" / "manifest.json").write_bytes(gas.manifest)
    made = catalog.propose(
        fleet.verified(),
        catalog.Change(add=(gas.addition(),)),
        source=catalog.FolderSource(tmp_path / "build"),
        signer=fleet.signer("ada"),
        approvers=("ada",),
        now=fleet.clock(),
    )
    assert made.complete


class TestTwoOfThree:
    @pytest.fixture
    def fleet(self, make_fleet):
        return make_fleet("three", approvers=("ada", "bea", "cyd"), threshold=2)

    def cosign(self, fleet, made, approver, **more):
        return catalog.cosign(
            fleet.verified(),
            more.pop("metadata", made.metadata),
            more.pop("floors", made.floors),
            source=fleet.source(),
            signer=fleet.signer(more.pop("key", approver)),
            approver=approver,
            now=fleet.clock() + more.pop("off", dt.timedelta()),
            **more,
        )

    @pytest.fixture
    def gas(self, fleet, make_bundle):
        return fleet.push(make_bundle("gas", "1.0.0"))

    def test_threshold_not_met_is_refused_by_server_and_device(self, fleet, gas, make_device):
        from skerry_server import trust

        made = fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea",))
        assert not made.complete
        with pytest.raises(RepositoryRefused, match="1/2") as refused:
            fleet.install(made)
        assert refused.value.code == "bad_signature"
        # A server that looks away serves it; the device does not.
        device = make_device(fleet, "device").enrol()
        fleet.repository.publish_manifest(gas.manifest)
        (fleet.metadata_file("2.catalog.json")).write_bytes(made.metadata)
        from dataclasses import replace

        state = fleet.repository._metadata.load()
        fleet.repository._metadata.publish(
            replace(state, catalog=fleet.repository._metadata._read(layout.CATALOG_ROLE, 2, type(state.catalog.signed)))
        )
        answer = device.error("manifest", model="gas", version="1.0.0", digest=gas.digest)
        assert answer == ("rejected", "bad_signature")
        assert trust.catalog_entries(Metadata.from_bytes(made.metadata).signed)

    def test_second_signature_completes_the_same_document(self, fleet, gas, make_device):
        made = fleet.propose(catalog.Change(add=(gas.addition(),), floors={"gas": "1.0.0"}), others=("bea",))
        both = self.cosign(fleet, made, "bea")
        assert both.complete
        assert both.difference == made.difference
        fleet.install(both)
        assert fleet.repository.catalog_entries()[0].custom["approvers"] == ["ada", "bea"]
        make_device(fleet, "device").enrol().manifest(gas)

    def test_clocks_that_differ_stop_no_second_signature_unless_by_days(self, fleet, gas):
        made = fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea",))
        with pytest.raises(RefusedForSafety, match="by this machine's clock"):
            self.cosign(fleet, made, "bea", off=dt.timedelta(days=-2))
        assert self.cosign(fleet, made, "bea", off=dt.timedelta(hours=-2)).complete

    def test_the_same_approver_twice_counts_once(self, fleet, gas):
        made = fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea",))
        assert not self.cosign(fleet, made, "ada").complete

    def test_signature_of_another_document_counts_for_nothing(self, fleet, gas, make_bundle):
        made = fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea",))
        other = fleet.propose(catalog.Change(floors={"gas": "9.0.0"}), others=("bea",))
        mixed = Metadata.from_bytes(made.metadata)
        mixed.signatures = Metadata.from_bytes(other.metadata).signatures
        with pytest.raises(RefusedForSafety, match="no approver's signature holds"):
            self.cosign(fleet, made, "bea", metadata=mixed.to_bytes())

    @pytest.mark.parametrize("how", ["unsigned", "by the server"])
    @pytest.mark.attack("stolen server slips a bundle in")
    def test_a_bundle_that_the_server_slips_into_a_proposal_is_not_signed(self, fleet, gas, make_bundle, how):
        """Only an approver's signature makes a change a colleague's: whoever holds the server has none."""
        made = fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea",))
        evil = fleet.push(make_bundle("gas", "6.6.6", weights=b"evil"))
        slipped = Metadata.from_bytes(made.metadata)
        path = layout.manifest_target("gas", "6.6.6")
        slipped.signed.targets[path] = TargetFile.from_dict(
            {
                "length": len(evil.manifest),
                "hashes": {"sha256": evil.digest},
                "custom": {"submitter": "ci", "approvers": ["ada", "bea"]},
            },
            path,
        )
        if how == "by the server":
            slipped.sign(fleet.online, append=True)
        with pytest.raises(RefusedForSafety, match="no approver's signature holds"):
            self.cosign(fleet, made, "bea", metadata=slipped.to_bytes())

    def test_approver_who_is_not_named_does_not_sign(self, fleet, gas):
        made = fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea",))
        with pytest.raises(RefusedForSafety, match="do not all name 'cyd'"):
            self.cosign(fleet, made, "cyd")

    def test_second_approver_checks_the_bundle_again(self, fleet, gas):
        made = fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea",))
        sha256 = gas.files[1]["sha256"]
        path = fleet.path / "blobs" / "sha256" / sha256[:2] / sha256
        path.write_bytes(b"x" + path.read_bytes()[1:])
        with pytest.raises(RefusedForSafety, match=r"model\.onnx"):
            self.cosign(fleet, made, "bea")

    @pytest.mark.parametrize("what", ["field", "hash", "delegation", "expiry", "length"])
    def test_proposal_with_more_than_the_change_is_refused(self, fleet, gas, what):
        made = fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea",))
        theirs = Metadata.from_bytes(made.metadata)
        target = theirs.signed.targets[layout.manifest_target("gas", "1.0.0")]
        if what == "field":
            target.unrecognized_fields["custom"]["also"] = "this"
        elif what == "hash":
            target.hashes["sha512"] = "0" * 128
        elif what == "length":
            target.length += 1
        elif what == "expiry":
            theirs.signed.expires += dt.timedelta(days=400)
        else:
            theirs.signed.unrecognized_fields["x"] = 1
        theirs.sign(fleet.signer("ada"))
        with pytest.raises(RefusedForSafety):
            self.cosign(fleet, made, "bea", metadata=theirs.to_bytes())

    def test_floors_that_are_not_the_proposals_are_refused(self, fleet, gas):
        made = fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea",))
        with pytest.raises(RefusedForSafety):
            self.cosign(fleet, made, "bea", floors=b'{"floors":{"gas":"9.0.0"},"schema":1}')

    def test_online_key_gives_no_signature_of_an_approver(self, fleet, gas):
        made = fleet.propose(catalog.Change(add=(gas.addition(),)), others=("bea",))
        forged = Metadata.from_bytes(made.metadata)
        forged.sign(fleet.online, append=True)
        both = self.cosign(fleet, made, "ada", metadata=forged.to_bytes())
        assert both.signed == (fleet.signer("ada").public_key.keyid,)

    def test_a_list_reads_no_more_catalogs_than_it_shows(self, fleet, gas, make_bundle, tmp_path):
        """Each may hold a megabyte, and hundreds are kept: a viewer's request must not read them all."""
        engine = open_engine(sqlite_url(tmp_path / "server.db"))
        migrations.migrate(engine)
        now_ms = [int(fleet.clock().timestamp() * 1000)]
        place = Proposals(engine, Publication(engine, fleet.repository, lambda: now_ms[0]), lambda: now_ms[0])
        oil = fleet.push(make_bundle("oil", "1.0.0"))
        made = [
            fleet.propose(catalog.Change(add=(bundle.addition(),), floors={"gas": floor}), others=("bea",))
            for bundle, floor in ((gas, "0.1.0"), (gas, "0.2.0"), (oil, "0.1.0"))
        ]
        ids = []
        for proposal in made:
            now_ms[0] += 1
            sent = place.submit(proposal.metadata, proposal.floors, targets=None, root=None, actor="ada")
            ids.append(sent["id"])
        place.withdraw(ids[1], reason="not now", actor="ada")
        # Whoever counts signatures or entries of this one fails.
        with writing(engine) as conn:
            conn.execute(update(t.proposals).where(t.proposals.c.id == ids[0]).values(metadata=b"nonsense"))
        (newest,) = place.listed(ended=False, limit=1)
        assert (newest["id"], newest["state"], newest["changes"]["added"][0]["model"]) == (ids[2], "open", "oil")
        newest, withdrawn = place.listed(ended=True, limit=2)
        assert newest["id"] == ids[2]
        shown = {name: value for name, value in place.one(ids[1]).items() if name in withdrawn}
        assert (withdrawn, withdrawn["state"]) == (shown, "withdrawn")
        assert (len(withdrawn["signed"]), len(withdrawn["missing"]), withdrawn["threshold"]) == (1, 2, 2)
        # Another catalog makes all of them void: none is read to say that none is open.
        fleet.install(
            self.cosign(fleet, fleet.propose(catalog.Change(floors={"gas": "0.3.0"}), others=("bea",)), "bea")
        )
        fleet.install(
            self.cosign(fleet, fleet.propose(catalog.Change(floors={"gas": "0.4.0"}), others=("bea",)), "bea")
        )
        assert place.listed(ended=False, limit=100) == []
        assert place.one(ids[2])["state"] == "void"
        engine.dispose()


def test_ceremony_with_an_unencrypted_key_that_others_can_read_is_not_opened(fleet):
    path = fleet.ceremony.key_path("ada")
    path.chmod(0o644)
    with pytest.raises(Usage, match="others may read"):
        key_files.load_signer(path, None)
