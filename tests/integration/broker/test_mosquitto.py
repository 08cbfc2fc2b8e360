"""What is Mosquitto's own: the packaged list of rights says what the contract says, and a revoked device is cut off by it."""

import os
import signal
import time

import pytest
from skerry_contract import ids, topics

from tests.integration.broker.mosquitto import PACKAGED


def rights():
    """(user or ``%u``, access, topic filter) of the packaged file, comments left out."""
    user, found = "", set()
    for line in (PACKAGED / "skerry.acl").read_text().splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "user":
            user = rest
        elif kind in ("topic", "pattern"):
            access, _, topic = rest.partition(" ")
            found.add(("%u" if kind == "pattern" else user, access, topic))
    return found


def test_the_packaged_rights_are_those_of_the_contract():
    anyone = ids.DeviceId("%u")
    wanted = {("%u", "write", topic) for topic in topics.device_may_publish(anyone)}
    wanted |= {("%u", "read", topic) for topic in topics.device_may_read(anyone)}
    assert rights() == wanted | {(ids.SERVER_IDENTITY, "readwrite", f"{topics.ROOT}/#")}


def test_the_packaged_listeners_want_a_certificate_and_devices_keep_its_name():
    text = (PACKAGED / "skerry.conf").read_text()
    head, devices, servers = text.split("\nlistener ")
    assert "allow_anonymous false" in head and "acl_file" in head
    for listener in (devices, servers):
        assert "\nrequire_certificate true\n" in listener and "\nuse_identity_as_username true\n" in listener
    assert "\nuse_username_as_clientid true\n" in devices
    assert servers.startswith("8884 127.0.0.1\n")


@pytest.mark.parametrize("identity", ["dev-b", "_server", "", "dev-unknown"])
@pytest.mark.attack("foreign client id")
def test_a_foreign_client_id_becomes_ones_own(mosquitto_fleet, peers, identity):
    fleet = mosquitto_fleet
    victims = [peers(peers.Peer, fleet, "dev-b").open(), peers(peers.Peer, fleet, "_server").open()]
    thief = peers(peers.Peer, fleet, "dev-a", client_id=identity, clean=True).open()
    time.sleep(0.5)
    assert [victim.drops for victim in victims] == [[], []]
    # It is dev-a whatever it says: the next session of dev-a takes its place.
    peers(peers.Peer, fleet, "dev-a", returns=False).open()
    peers.until(lambda: thief.drops, "the session under the certificate's name taken")


def test_a_revoked_device_is_silenced_in_the_session_it_has(mosquitto_fleet, peers):
    fleet = mosquitto_fleet
    server = peers(peers.Peer, fleet, "_server").open()
    assert server.subscribed(topics.ALL_UP)
    revoked = peers(peers.Peer, fleet, "dev-a").open()
    stays = peers(peers.Peer, fleet, "dev-b").open()
    for device, name in ((revoked, "dev-a"), (stays, "dev-b")):
        assert device.subscribed(topics.bell(name))
        assert device.subscribed(topics.ALL_GROUP_BELLS)
    fleet.broker.revoke("dev-a")
    peers.until(lambda: "Reloading config" in fleet.broker.log(), "the list read again")
    time.sleep(0.3)
    for name in ("dev-a", "dev-b"):
        server.publish(topics.bell(name), b"ring")
    server.publish(topics.group_bell("g"), b"ring")
    for device, name in ((revoked, "dev-a"), (stays, "dev-b")):
        device.publish(topics.up(name), b"records")
    peers.until(
        lambda: len(stays.got) == 2 and (topics.up("dev-b"), b"records") in server.got, "the other's life goes on"
    )
    time.sleep(0.3)
    assert revoked.got == []
    assert (topics.up("dev-a"), b"records") not in server.got


def test_a_killed_mosquitto_comes_back_and_the_server_rings_again(mosquitto_fleet, peers):
    fleet = mosquitto_fleet
    from skerry_server.db import queries
    from skerry_server.db.engine import writing

    with writing(fleet.engine) as connection:
        queries.bump_bell(connection, "d/dev-a")
    fleet.start_ingest()
    sessions = fleet.link.sessions
    os.kill(fleet.broker.pid, signal.SIGKILL)
    peers.until(lambda: fleet.link.sessions > sessions and fleet.link.connected, "a new session")
    device = peers(peers.Peer, fleet, "dev-a").open()
    assert device.subscribed(topics.bell("dev-a"))
    peers.until(lambda: any(topic == topics.bell("dev-a") for topic, _ in device.got), "the bell, retained again")
