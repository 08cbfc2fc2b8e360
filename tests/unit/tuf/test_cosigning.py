"""Metadata that several people sign: what counts as a signature, and when there are enough."""

import datetime as dt
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner
from skerry_cli import cosigning, offline_roles
from skerry_cli.cosigning import Authority
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_cli.offline_roles import Holders, RootWish, TargetsWish
from tuf.api.metadata import Metadata, Root, Targets

NOW = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
ADA, BEA, CLEO, DAN = (CryptoSigner.generate_ed25519() for _ in range(4))


def holders(threshold, *signers):
    return Holders(keys={s.public_key.keyid: s.public_key for s in signers}, threshold=threshold)


def root(version=1, roots=None, targets=None, expires=NOW):
    wish = RootWish(
        root=roots or holders(2, ADA, BEA, CLEO), targets=targets or holders(1, DAN), online=holders(1, DAN).keys
    )
    return wish.build(version, expires)


def signed(role, *signers, authorities):
    metadata = Metadata(role)
    for signer in signers:
        metadata = cosigning.add_signature(metadata, signer, authorities)
    return metadata


def test_two_of_three_complete_it_and_each_is_named():
    own = (Authority.of(root(), Root.type),)
    one = signed(root(), ADA, authorities=own)
    found = cosigning.standing(one, own)
    assert not found.complete
    assert found.text({ADA.public_key.keyid: "ada", BEA.public_key.keyid: "bea", CLEO.public_key.keyid: "cleo"}) == (
        "signed by ada; wanted: 1 more of bea, cleo for root version 1"
    )
    both = cosigning.add_signature(one, BEA, own)
    assert cosigning.standing(both, own).complete


def test_signing_twice_is_one_signature():
    own = (Authority.of(root(), Root.type),)
    twice = signed(root(), ADA, ADA, authorities=own)
    assert not cosigning.standing(twice, own).complete


def test_one_key_under_two_ids_is_one_signer():
    key = ADA.public_key
    other = type(key)("f" * 64, key.keytype, key.scheme, key.keyval)
    own = (Authority(whose="root version 1", keys={key.keyid: key, other.keyid: other}, threshold=2),)
    one = signed(root(), ADA, authorities=own)
    one.signatures[other.keyid] = one.signatures[key.keyid]
    assert not cosigning.standing(one, own).complete


def test_a_stranger_cannot_sign_and_a_strangers_signature_is_dropped():
    own = (Authority.of(root(), Root.type),)
    with pytest.raises(RefusedForSafety, match="not among the keys"):
        cosigning.add_signature(Metadata(root()), DAN, own)
    foreign = Metadata(root())
    foreign.sign(DAN)
    assert list(cosigning.add_signature(foreign, ADA, own).signatures) == [ADA.public_key.keyid]


def test_signature_over_something_else_counts_for_nothing_and_is_not_passed_on():
    own = (Authority.of(root(), Root.type),)
    other = signed(root(expires=NOW + dt.timedelta(days=1)), ADA, authorities=own)
    moved = Metadata(root(), dict(other.signatures))
    assert cosigning.standing(moved, own).signed == ()
    assert list(cosigning.add_signature(moved, BEA, own).signatures) == [BEA.public_key.keyid]


def test_next_root_needs_the_old_threshold_and_its_own():
    old = root()
    new = root(2, roots=holders(1, DAN))
    asked = cosigning.authorities_of_root(old, new)
    assert not cosigning.standing(signed(new, DAN, authorities=asked), asked).complete
    assert not cosigning.standing(signed(new, ADA, BEA, authorities=asked), asked).complete
    whole = signed(new, ADA, DAN, BEA, authorities=asked)
    assert cosigning.standing(whole, asked).complete
    old.verify_delegate(Root.type, whole.signed_bytes, whole.signatures)
    new.verify_delegate(Root.type, whole.signed_bytes, whole.signatures)


def test_copies_that_differ_are_not_merged():
    own = (Authority.of(root(), Root.type),)
    mine = signed(root(), ADA, authorities=own)
    theirs = signed(root(expires=NOW + dt.timedelta(days=1)), BEA, authorities=own)
    with pytest.raises(RefusedForSafety, match="do not say the same"):
        cosigning.merge([mine, theirs], own)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.sampled_from([0, 1, 2])), min_size=1, max_size=4))
def test_any_order_of_merging_ends_the_same(who):
    own = (Authority.of(root(), Root.type),)
    people = (ADA, BEA, CLEO)
    copies = [signed(root(), *(people[i] for i in sorted(some)), authorities=own) for some in who]
    found = {frozenset(cosigning.merge(order, own).signatures) for order in itertools.permutations(copies)}
    assert found == {frozenset(people[i].public_key.keyid for some in who for i in some)}


def test_a_copy_may_not_carry_anothers_broken_signature_over_a_good_one():
    own = (Authority.of(root(), Root.type),)
    good = signed(root(), ADA, authorities=own)
    bad = Metadata(root(), dict(signed(root(), BEA, authorities=own).signatures))
    bad.signatures[ADA.public_key.keyid] = bad.signatures[BEA.public_key.keyid]
    merged = cosigning.merge([good, bad], own)
    assert cosigning.standing(merged, own).complete


def test_keys_come_in_and_go_out_by_name_only_when_they_can():
    held = holders(2, ADA, BEA)
    more = offline_roles.with_keys(held, add=holders(1, CLEO).keys, remove=(ADA.public_key.keyid,), threshold=None)
    assert list(more.keys) == [BEA.public_key.keyid, CLEO.public_key.keyid]
    for wrong in (
        {"add": {}, "remove": (CLEO.public_key.keyid,), "threshold": None},
        {"add": holders(1, ADA).keys, "remove": (), "threshold": None},
        {"add": {}, "remove": (ADA.public_key.keyid,), "threshold": None},  # one key cannot make two signatures
        {"add": {}, "remove": (), "threshold": 0},
    ):
        with pytest.raises(Usage):
            offline_roles.with_keys(held, **wrong)


def test_difference_says_who_comes_and_goes_with_the_whole_fingerprint():
    new = root(2, roots=holders(1, ADA, DAN))
    lines = offline_roles.difference(root(), new, {ADA.public_key.keyid: "ada", BEA.public_key.keyid: "bea"})
    assert lines[0] == "root version 1 -> 2, expires 2026-03-01 -> 2026-03-01"
    assert f"+ root: unnamed  {offline_roles.spoken(DAN.public_key.keyid)}" in lines
    assert f"- root: bea  {offline_roles.spoken(BEA.public_key.keyid)}" in lines
    assert "~ root: 1 of 2 must sign, was 2" in lines
    assert "renews the expiry" in offline_roles.difference(root(), root(2), {})[-1]


def test_role_that_holds_more_than_keys_is_not_plain():
    plain = root()
    offline_roles.require_plain("root", plain)
    plain.unrecognized_fields["note"] = "x"
    with pytest.raises(RefusedForSafety, match="holds more"):
        offline_roles.require_plain("root", plain)
    targets = TargetsWish(catalog=holders(1, ADA), online=holders(1, DAN).keys).build(1, NOW)
    offline_roles.require_plain("targets", targets)
    targets.delegations.roles["catalog"].paths.append("fleet/*")
    with pytest.raises(RefusedForSafety, match="holds more"):
        offline_roles.require_plain("targets", targets)
    with pytest.raises(RefusedForSafety, match="not from this tool"):
        offline_roles.require_plain("targets", Targets(version=1, expires=NOW))
