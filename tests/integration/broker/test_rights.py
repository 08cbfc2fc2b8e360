"""Who may say and read what: the broker, embedded NATS or Mosquitto, decides by the certificate alone."""

import socket
import ssl
import time

import pytest
from skerry_contract import topics

FORGED = [
    "skerry/1/d/dev-b/up",
    "skerry/1/d/dev-b/state",
    "skerry/1/d/dev-a/ack",
    "skerry/1/d/dev-a/bell",
    "skerry/1/g/g/bell",
    "skerry/1/server/state",
    "$MQTT/msgs/skerry/1/d/dev-b/up",
    "$MQTT/msgs/skerry.1.d.dev-b.up",
    "$MQTT.msgs.skerry.1.d.dev-b.up",
    "$MQTT/rmsgs/skerry/1/d/dev-b/state",
    "$MQTT/sess/x",
    "$MQTT/sub/x",
    "$MQTT/deliver/pubrel/x",
    "$MQTT/JSA/x/SL/y",
    "$JS/API/STREAM/NAMES",
    "$JS/API/STREAM/PURGE/$MQTT_msgs",
    "$JS/API/STREAM/DELETE/$MQTT_sess",
    "$JS/API/STREAM/MSG/GET/$MQTT_msgs",
    "$JS/API/CONSUMER/CREATE/$MQTT_msgs",
    "$SYS/REQ/SERVER/PING",
    "_INBOX/x",
]
SECRET = [
    "skerry/1/d/dev-b/ack",
    "skerry/1/d/dev-b/bell",
    "skerry/1/d/dev-b/state",
    "skerry/1/d/dev-b/up",
    "skerry/1/d/dev-a/up",
    "skerry/1/d/+/ack",
    "skerry/1/d/+/state",
    "skerry/1/+/dev-b/ack",
    "skerry/1/d/#",
    "skerry/#",
    "#",
    "+/+/+/+/+",
    "$MQTT/msgs/skerry/1/d/dev-b/up",
    "$MQTT/msgs/#",
    "$MQTT/#",
    "$MQTT.>",
    "$JS/API/#",
    "$JS/#",
    "$SYS/#",
    "_INBOX/#",
]


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.attack("cross-device publish")
def test_a_device_cannot_publish_as_another_nor_into_the_brokers_streams(quiet_fleet, peers, witness, qos, retain):
    device = peers(peers.Peer, quiet_fleet, "dev-a").open()
    other = peers(peers.Peer, quiet_fleet, "dev-b").open()
    for topic in topics.device_may_read("dev-b"):
        assert other.subscribed(topic)
    time.sleep(0.2)
    heard, seen = len(other.got), len(witness.got)
    refused_before = quiet_fleet.refused_publishes()
    for topic in FORGED:
        device.client.publish(topic, b"forged", qos=qos, retain=retain)
    # What it may say arrives, and was said after all the others.
    device.publish(topics.up("dev-a"), b"mine")
    peers.until(lambda: (topics.up("dev-a"), b"mine") in witness.got[seen:], "the own message at the server")
    time.sleep(0.3)
    assert all(payload != b"forged" for _, payload in witness.got)
    assert other.got[heard:] == []
    # The broker refused each one by name, rather than finding no reader.
    assert quiet_fleet.refused_publishes() - refused_before >= len(FORGED)
    late = peers(peers.Peer, quiet_fleet, "_server", client_id="late").open()
    assert late.subscribed("skerry/1/+/#")
    time.sleep(0.3)
    assert all(payload != b"forged" for _, payload in late.got), "a forged message was retained"


@pytest.mark.parametrize("qos", [0, 1])
def test_a_device_cannot_read_what_is_not_its_own(quiet_fleet, peers, witness, qos):
    device = peers(peers.Peer, quiet_fleet, "dev-a").open()
    granted = [topic for topic in SECRET if device.subscribed(topic, qos)]
    assert granted == [] if quiet_fleet.refuses_subscriptions else granted
    other = peers(peers.Peer, quiet_fleet, "dev-b").open()
    other.publish(topics.up("dev-b"), b"b's records")
    other.publish(topics.state("dev-b"), b"b's state", retain=True)
    witness.publish(topics.ack("dev-b"), b"b's ack")
    witness.publish(topics.bell("dev-b"), b"b's bell", retain=True)
    time.sleep(0.4)
    assert device.got == []
    assert device.client.is_connected()


def test_a_device_reads_exactly_its_own(quiet_fleet, peers, witness):
    device = peers(peers.Peer, quiet_fleet, "dev-a").open()
    assert all(device.subscribed(topic) for topic in topics.device_may_read("dev-a"))
    for topic in (topics.ack("dev-a"), topics.bell("dev-a"), topics.group_bell("g"), topics.SERVER_STATE):
        witness.publish(topic, topic.encode())
    peers.until(lambda: len({topic for topic, _ in device.got}) >= 4, "all four")


@pytest.mark.attack("cross-device publish")
def test_a_will_cannot_speak_for_another(quiet_fleet, peers, witness):
    seen = len(witness.got)
    for victim in ("skerry/1/d/dev-b/state", "$MQTT/msgs/skerry/1/d/dev-b/state", "skerry/1/server/state"):
        device = peers(peers.Peer, quiet_fleet, "dev-a", will=(victim, b"forged will"))
        if not device.refused():
            device.cut()
        device.close()
    honest = peers(peers.Peer, quiet_fleet, "dev-a", will=(topics.state("dev-a"), b"own will")).open()
    honest.cut()
    peers.until(lambda: (topics.state("dev-a"), b"own will") in witness.got[seen:], "the own will")
    assert all(payload != b"forged will" for _, payload in witness.got)


def test_a_client_without_certificate_is_refused(quiet_fleet, peers):
    nobody = peers(peers.Peer, quiet_fleet, "nobody", certificate=False)
    assert nobody.refused()


def test_a_certificate_of_another_authority_is_refused(quiet_fleet, peers):
    stranger = peers(peers.Peer, quiet_fleet, "dev-a", authority=quiet_fleet.stranger)
    assert stranger.refused()


@pytest.mark.attack("cross-device publish")
def test_a_device_cannot_wipe_or_replace_what_the_server_retained(quiet_fleet, peers, witness):
    device = peers(peers.Peer, quiet_fleet, "dev-a").open()
    kept = {
        topics.bell("dev-a"): b"own bell",
        topics.bell("dev-b"): b"b's bell",
        topics.group_bell("g"): b"group's bell",
        topics.SERVER_STATE: b"server's state",
    }
    for topic, payload in kept.items():
        witness.publish(topic, payload, retain=True)
    for topic in kept:
        for payload in (b"", b"forged"):
            device.publish(topic, payload, retain=True)
    late = peers(peers.Peer, quiet_fleet, "_server", client_id="reader").open()
    assert late.subscribed("skerry/1/+/#")
    assert late.subscribed("skerry/1/server/state")
    peers.until(lambda: kept.items() <= dict(late.got).items(), "everything that was retained, as it was")
    for topic in kept:
        witness.publish(topic, b"", retain=True)


def test_a_device_keeps_its_own_state_and_reads_it_back(quiet_fleet, peers, witness):
    first = peers(peers.Peer, quiet_fleet, "dev-a").open()
    first.publish(topics.state("dev-a"), b"what I am", retain=True)
    first.close()
    again = peers(peers.Peer, quiet_fleet, "dev-a").open()
    assert again.subscribed(topics.state("dev-a"))
    peers.until(lambda: (topics.state("dev-a"), b"what I am") in again.got, "its own retained state")
    again.publish(topics.state("dev-a"), b"", retain=True)


def test_on_nats_a_certificate_of_ours_for_a_device_that_is_not_enrolled_is_refused(nats_fleet, peers):
    unknown = peers(peers.Peer, nats_fleet, "dev-unknown")
    assert unknown.refused()


@pytest.mark.parametrize("password", [None, "", "x"])
@pytest.mark.parametrize("name", ["dev-b", "_server"])
def test_a_user_name_changes_nobody_into_another(quiet_fleet, peers, witness, name, password):
    device = peers(peers.Peer, quiet_fleet, "dev-a")
    device.client.username_pw_set(name, password)
    seen = len(witness.got)
    if not device.refused():
        device.client.publish(topics.up("dev-b"), b"by name", qos=1)
        device.client.publish(topics.SERVER_STATE, b"by name", qos=1)
        device.publish(topics.up("dev-a"), b"by certificate")
        time.sleep(0.3)
    assert (topics.up("dev-b"), b"by name") not in witness.got[seen:]
    assert (topics.SERVER_STATE, b"by name") not in witness.got[seen:]


@pytest.mark.parametrize("identity", ["dev-a", "_server"])
def test_the_brokers_own_protocol_lets_nobody_in(nats_fleet, identity):
    port = int(nats_fleet.broker.config_file.read_text().split("\nport: ")[1].split("\n")[0])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(str(nats_fleet.authority.pem))
    context.load_cert_chain(*map(str, nats_fleet.authority.issue(identity)))
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        assert plain.recv(4096).startswith(b"INFO ")
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
            secure.sendall(b'CONNECT {"verbose":true,"pedantic":false}\r\nPING\r\nSUB skerry.> 1\r\n')
            said = b""
            try:
                while chunk := secure.recv(4096):
                    said += chunk
            except OSError:
                pass
    assert b"Authorization Violation" in said
    assert b"PONG" not in said


def test_a_session_left_by_one_device_tells_nothing_to_another(quiet_fleet, peers, witness):
    # dev-b keeps a persistent session; dev-a takes its client id, and with it the broker's session.
    victim = peers(peers.Peer, quiet_fleet, "dev-b", clean=False).open()
    assert victim.subscribed(topics.ack("dev-b"))
    victim.close()
    witness.publish(topics.ack("dev-b"), b"for b alone")
    thief = peers(peers.Peer, quiet_fleet, "dev-a", client_id="dev-b", clean=False)
    thief.refused()
    time.sleep(0.5)
    witness.publish(topics.ack("dev-b"), b"for b alone, too")
    time.sleep(0.5)
    assert thief.got == []
    thief.close()
    # The session was real: its owner still gets what was kept for it.
    owner = peers(peers.Peer, quiet_fleet, "dev-b", clean=False).open()
    peers.until(lambda: (topics.ack("dev-b"), b"for b alone, too") in owner.got, "what was kept for dev-b")


def test_the_generated_files_are_the_owners_alone(nats_fleet):
    assert nats_fleet.broker.config_file.stat().st_mode & 0o777 == 0o600
    assert nats_fleet.broker.config_file.parent.stat().st_mode & 0o777 == 0o700
