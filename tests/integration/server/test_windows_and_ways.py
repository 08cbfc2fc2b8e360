"""What a group's document says of when and over what its devices update: maintenance windows, versions that must be passed through."""

from __future__ import annotations

import contextlib
from pathlib import Path

from skerry_contract import group as g
from skerry_contract import opening

from tests.integration.server.rollout_fleet import MODEL, Maker, published, start
from tests.rig_server import DeviceRig, Operator, ServerRig


def document(rig: ServerRig, group: str) -> g.GroupDocument | None:
    """The group's, None before the first was published."""
    with contextlib.suppress(KeyError):
        return published(rig, group)
    return None


def test_a_bundle_brings_what_it_goes_after_into_the_document_where_that_is_approved(
    rig: ServerRig, maker: Maker, group: str
) -> None:
    first, between = maker.publish(MODEL, "1.0.0"), maker.push(MODEL, "1.5.0", seed=3)
    last = Operator.publish(maker, MODEL, "2.5.0", seed=4, changes={"after": "1.5.0", "requires": ["after"]})
    rig.good("PUT", f"/api/v1/groups/{group}/models/{MODEL}", {"stable": first})
    start(rig, group, last, [{"share": 1}])
    plan = rig.wait("a rollout", lambda: (d := document(rig, group)) and d.models[MODEL].rollout and d.models[MODEL])
    assert plan.via == (), "it is not approved"
    maker.approve(MODEL, "1.5.0", between)
    passed = rig.wait("the version on the way", lambda: published(rig, group).models[MODEL].via)
    assert [(one.version, one.digest) for one in passed] == [("1.5.0", between)]
    # It is found bad; a later one goes in its place.
    better = maker.publish(MODEL, "1.6.0", seed=8)
    for step in ("deprecate", "retire"):
        rig.good("POST", f"/api/v1/bundles/{between}/{step}", {"reason": "it forgets its scales"})
    rig.wait("the later one", lambda: [one.digest for one in published(rig, group).models[MODEL].via] == [better])


def test_what_a_pinned_bundle_goes_after_is_in_the_document_too(
    rig: ServerRig, maker: Maker, group: str, tmp_path: Path
) -> None:
    first, _ = maker.publish(MODEL, "3.0.0", seed=5), maker.publish(MODEL, "3.5.0", seed=6)
    last = Operator.publish(maker, MODEL, "4.0.0", seed=7, changes={"after": "3.5.0", "requires": ["after"]})
    rig.good("PUT", f"/api/v1/groups/{group}/models/{MODEL}", {"stable": first})
    DeviceRig(rig, "pinned-1", tmp_path, group=group).enrol()
    assert rig.wait("the group", lambda: document(rig, group)).models[MODEL].via == ()
    rig.good("PUT", f"/api/v1/devices/pinned-1/pins/{MODEL}", {"digest": last, "reason": "a test"})
    found = rig.wait("the version on the way", lambda: published(rig, group).models[MODEL].via)
    assert [one.version for one in found] == ["3.5.0"]


def test_windows_of_a_group_reach_its_document_and_keep_off_agents_that_do_not_know_them(
    rig: ServerRig, group: str
) -> None:
    window = {"start": "22:00", "end": "04:00", "days": ["fri"]}
    rig.good("PUT", f"/api/v1/groups/{group}", {"settings": {"windows": [window]}})
    found = rig.wait("the settings", lambda: (d := document(rig, group)) and d.settings.windows and d)
    assert found.settings.windows == (opening.Window(start="22:00", end="04:00", days=("fri",)),)
    assert "windows" in found.requires
    wrong = rig.ask("PUT", f"/api/v1/groups/{group}", {"settings": {"windows": [{**window, "end": "25:00"}]}})
    assert wrong.status == 422, wrong.data
    assert b"settings.windows[0]" in wrong.data


def test_networks_and_a_time_reach_the_document_and_keep_off_agents_that_do_not_know_them(
    rig: ServerRig, group: str
) -> None:
    hours = [{"start": "18:00", "end": "08:00"}]
    wanted = {"networks": ["wifi", "unmetered"], "opens_at": 1_900_000_000, "fetch_windows": hours}
    rig.good("PUT", f"/api/v1/groups/{group}", {"settings": wanted})
    found = rig.wait("the settings", lambda: (d := document(rig, group)) and d.settings.opens_at and d)
    assert (found.settings.networks, found.settings.opens_at) == (("wifi", "unmetered"), 1_900_000_000)
    assert found.settings.fetch_windows == (opening.Window(start="18:00", end="08:00"),)
    assert {"networks", "opens_at", "fetch_windows"} <= set(found.requires)
    wrong = rig.ask("PUT", f"/api/v1/groups/{group}", {"settings": {"networks": ["wfi"]}})
    assert wrong.status == 422, wrong.data
    assert b"settings.networks: wanted some of cellular, ethernet, unmetered, wifi, got wfi" in wrong.data
