"""From a device's outbox to the database over the real broker: every record once, whatever dies or lies on the way."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import zlib

import pytest
from skerry_contract import ids, topics, wire
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.engine import writing
from skerry_server.ingest import IngestSettings
from sqlalchemy import select

_BOMB_BYTES = 96 << 20


def once(fleet, sender, total):
    """Every record of the sender is in the database, one time."""
    sender.settled()
    assert fleet.counted(sender.identity) == total
    stream = fleet.stream(sender.identity)
    assert (stream.upto, stream.records, stream.conflicts) == (sender.last_seq, sender.last_seq, 0)
    rows = fleet.rows(select(t.windows.c.seq).where(t.windows.c.device == sender.identity))
    assert sorted(row.seq for row in rows) == list(range(1, sender.last_seq + 1))


def test_records_arrive_and_are_acknowledged(fleet, peers):
    fleet.start_ingest()
    device = peers(peers.Sender, fleet, "dev-a").open()
    device.count(*range(50))
    once(fleet, device, sum(range(50)))


def test_what_was_sent_while_the_server_was_away_arrives_after_its_start(fleet, peers):
    device = peers(peers.Sender, fleet, "dev-a").open()
    device.count(*range(30))
    time.sleep(1)
    fleet.start_ingest()
    once(fleet, device, sum(range(30)))


@pytest.mark.attack("foreign client id")
def test_taking_another_devices_client_id_costs_no_data(fleet, peers):
    fleet.start_ingest()
    honest = peers(peers.Sender, fleet, "dev-b").open()
    honest.count(*range(40))
    thief = peers(peers.Peer, fleet, "dev-a", client_id="dev-b").open()
    for _ in range(10):
        honest.count(1)
        time.sleep(0.15)
    if fleet.binds_client_ids:
        assert honest.drops == [], "the thief took the session"
    else:
        assert honest.drops, "the thief never took the session"
    thief.close()
    once(fleet, honest, sum(range(40)) + 10)
    assert fleet.stream("dev-a") is None


@pytest.mark.attack("foreign client id")
def test_taking_the_servers_client_id_costs_no_data(fleet, peers):
    fleet.start_ingest()
    sessions = fleet.link.sessions
    device = peers(peers.Sender, fleet, "dev-b").open()
    device.count(*range(40))
    # The id is random: a thief has to know it, as one who reads the server's memory or log would.
    stolen = fleet.link._session.client._client_id.decode()
    thief = peers(peers.Peer, fleet, "dev-a", client_id=stolen).open()
    if fleet.binds_client_ids:
        time.sleep(1)
        assert fleet.link.sessions == sessions, "the thief took the server's session"
    else:
        peers.until(lambda: fleet.link.sessions > sessions, "a new session of the server")
    device.count(*range(10))
    once(fleet, device, sum(range(40)) + sum(range(10)))
    if not fleet.binds_client_ids:
        assert fleet.link._session.client._client_id.decode() != stolen
    assert thief.got == []


def test_a_killed_broker_in_the_middle_loses_and_doubles_nothing(fleet, peers):
    fleet.start_ingest()
    devices = [peers(peers.Sender, fleet, name).open() for name in ("dev-a", "dev-b")]
    for round_ in range(3):
        for device in devices:
            device.count(*range(40))
        time.sleep(0.2)
        os.kill(fleet.broker.pid, signal.SIGKILL)
        peers.until(lambda n=round_: fleet.broker.restarts == n + 1, "a restart")
    for device in devices:
        once(fleet, device, 3 * sum(range(40)))


INGEST = """
import sys, time
from pathlib import Path
from skerry_server.db.engine import open_engine
from skerry_server.ingest import Ingest
from skerry_server.mqtt import Endpoint, ServerLink
url, port, ca, certificate, key = sys.argv[1:]
engine = open_engine(url)
link = ServerLink(engine, Endpoint(host="127.0.0.1", port=int(port), ca_file=Path(ca),
    certificate_file=Path(certificate), key_file=Path(key)))
Ingest(engine, link).start()
assert link.wait_connected(15)
print("up", flush=True)
time.sleep(120)
"""


def start_ingest_process(fleet):
    endpoint = fleet.endpoint()
    child = subprocess.Popen(
        [
            *(sys.executable, "-c", textwrap.dedent(INGEST), str(fleet.engine.url), str(endpoint.port)),
            *(str(endpoint.ca_file), str(endpoint.certificate_file), str(endpoint.key_file)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "up\n"
    return child


def test_a_killed_ingest_process_in_the_middle_loses_and_doubles_nothing(fleet, peers):
    device = peers(peers.Sender, fleet, "dev-a").open()
    device.count(*range(200))
    for _ in range(3):
        child = start_ingest_process(fleet)
        device.count(*range(50))
        time.sleep(0.15)
        child.kill()
        child.wait()
        child.stdout.close()
    assert device.pending, "it was too quick to be killed in the middle"
    fleet.start_ingest()
    once(fleet, device, sum(range(200)) + 3 * sum(range(50)))


def test_rubbish_is_counted_and_the_good_goes_on(fleet, peers):
    ingest = fleet.start_ingest()
    bad = peers(peers.Peer, fleet, "dev-a").open()
    good = peers(peers.Sender, fleet, "dev-b").open()
    packer = zlib.compressobj(level=9, wbits=-15)
    bomb = packer.compress(bytes(200 << 20)) + packer.flush()
    for payload in (b"", b"rubbish", bomb, bytes(wire.MAX_MESSAGE_BYTES + 1), os.urandom(100_000)):
        bad.publish(topics.up("dev-a"), payload)
        bad.publish(topics.state("dev-a"), payload, retain=True)
        good.count(1)
    once(fleet, good, 5)
    peers.until(lambda: ingest.totals.quarantined >= 9, "all set aside")
    counts = {
        row.name: row.n for row in fleet.rows(select(t.ingest_counters).where(t.ingest_counters.c.device == "dev-a"))
    }
    # The empty state is how MQTT clears a retained message: no fault.
    assert counts == {"malformed": 7, "oversized": 2}
    assert fleet.counted("dev-a") == 0


@pytest.mark.attack("decompression bomb")
def test_a_message_that_unpacks_to_very_much_is_set_aside_at_the_price_of_its_bound(fleet, peers):
    ingest = fleet.start_ingest()
    device = peers(peers.Peer, fleet, "dev-a").open()
    honest = peers(peers.Sender, fleet, "dev-b").open()
    packer = zlib.compressobj(level=9, wbits=-15)
    bomb = packer.compress(bytes(_BOMB_BYTES)) + packer.flush()
    assert len(bomb) < wire.MAX_MESSAGE_BYTES < wire.MAX_INFLATED_BYTES < _BOMB_BYTES // 8
    # Ingest runs in this process. What zlib unpacks is counted, wherever it goes then.
    tracemalloc.start()
    try:
        for n in range(3):
            device.publish(topics.up("dev-a"), bomb)
            honest.count(1)
            peers.until(lambda n=n: ingest.totals.quarantined > n, "it is set aside")
        once(fleet, honest, 3)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < _BOMB_BYTES // 4
    counts = {
        row.name: row.n for row in fleet.rows(select(t.ingest_counters).where(t.ingest_counters.c.device == "dev-a"))
    }
    assert counts == {"malformed": 3}


def test_replayed_messages_are_taken_once(fleet, peers):
    fleet.start_ingest()
    device = peers(peers.Sender, fleet, "dev-a").open()
    device.count(3, 4)
    records = tuple(device.pending.values())
    once(fleet, device, 7)
    message = wire.encode_batch(wire.Batch(epoch=device.epoch, records=records))

    def replayed():
        # One that comes while its like still waits is not even looked at.
        device.publish(topics.up("dev-a"), message)
        return fleet.stream("dev-a").duplicates >= 40

    peers.until(replayed, "the replays")
    once(fleet, device, 7)


@pytest.mark.attack("cross-device publish")
def test_a_forged_device_id_counts_for_nobody(fleet, peers):
    fleet.start_ingest()
    liar = peers(peers.Sender, fleet, "dev-a").open()
    liar.identity = "dev-b"  # sends its records to the topic of dev-b, with its own certificate
    liar.count(1000)
    honest = peers(peers.Sender, fleet, "dev-b").open()
    honest.count(5)
    once(fleet, honest, 5)
    assert liar.pending
    assert fleet.stream("dev-a") is None


def test_birth_and_will_reach_the_devices_row(fleet, peers):
    fleet.start_ingest()

    def row():
        return fleet.rows(select(t.devices).where(t.devices.c.id == "dev-a"))[0]

    def state(birth, status="online"):
        return wire.encode(wire.State(status=status, birth=birth))

    # It does not come back: the two would take the session from each other for ever.
    first = peers(peers.Peer, fleet, "dev-a", will=(topics.state("dev-a"), state(1, "offline")), returns=False).open()
    first.publish(topics.state("dev-a"), state(1), retain=True)
    peers.until(lambda: row().online, "dev-a online")
    # A second session takes the place of the first, whose will comes now, late.
    second = peers(peers.Peer, fleet, "dev-a", will=(topics.state("dev-a"), state(2, "offline"))).open()
    second.publish(topics.state("dev-a"), state(2), retain=True)
    second.publish(topics.state("dev-a"), state(1, "offline"), retain=True)
    time.sleep(0.5)
    assert (row().online, row().birth) == (True, 2)
    first.close()
    second.cut()
    peers.until(lambda: not row().online, "dev-a offline by its will")


def test_the_server_says_that_it_is_there_and_when_it_is_not(fleet, peers):
    device = peers(peers.Peer, fleet, "dev-a").open()
    assert device.subscribed(topics.SERVER_STATE)

    def said():
        return [wire.decode(wire.ServerState, payload) for topic, payload in device.got if topic == topics.SERVER_STATE]

    child = start_ingest_process(fleet)
    peers.until(lambda: said() and said()[-1].status == "online", "online")
    child.kill()
    child.wait()
    child.stdout.close()
    peers.until(lambda: said()[-1].status == "offline", "the will")
    assert said()[-1].birth == said()[0].birth
    fleet.start_ingest()
    peers.until(lambda: said()[-1].status == "online", "online again")
    assert said()[-1].birth > said()[0].birth
    fleet.ingest.stop()
    peers.until(lambda: said()[-1].status == "offline", "a goodbye")


def test_a_will_of_the_server_that_is_old_or_made_up_is_answered(fleet, peers):
    """Of an earlier session, of the present one, of one that never was: a device that believes it sends nothing until the next session."""
    fleet.start_ingest()
    device = peers(peers.Peer, fleet, "dev-a").open()
    assert device.subscribed(topics.SERVER_STATE)

    def said():
        return [wire.decode(wire.ServerState, payload) for topic, payload in device.got if topic == topics.SERVER_STATE]

    now = peers.until(lambda: [state for state in said() if state.status == "online"], "the server's word")[-1]
    ghost = peers(peers.Peer, fleet, "_server", client_id="ghost").open()
    for birth in (0, now.birth, (1 << 53) - 1):
        gone = wire.ServerState(status="offline", birth=birth)
        ghost.publish(topics.SERVER_STATE, wire.encode(gone), retain=True)
        peers.until(lambda gone=gone: said()[-2:] == [gone, now], "the server's answer")
    time.sleep(0.3)
    assert said()[-1] == now, "and it does not answer itself"


def test_bells_are_rung_and_rung_again_at_the_start(fleet, peers):
    with writing(fleet.engine) as connection:
        assert queries.bump_bell(connection, "g/g") == 1
        queries.bump_bell(connection, "d/dev-a")
    fleet.start_ingest()

    def noted():
        return {row.target: row.rung_version for row in fleet.rows(select(t.bells))}

    # NATS may give a message that is retained in the very moment of a subscription neither as new nor as retained.
    peers.until(lambda: noted() == {"d/dev-a": 1, "g/g": 1}, "rung")
    device = peers(peers.Peer, fleet, "dev-a").open()
    for topic in (topics.bell("dev-a"), topics.ALL_GROUP_BELLS):
        assert device.subscribed(topic)

    def heard():
        return {
            topic: wire.decode(wire.Bell, payload).version for topic, payload in device.got if topic.endswith("bell")
        }

    group = topics.group_bell(ids.GroupName("g"))
    peers.until(lambda: heard() == {topics.bell("dev-a"): 1, group: 1}, "both bells, retained")
    with writing(fleet.engine) as connection:
        version = queries.bump_bell(connection, "g/g")
    fleet.link.ring("g/g", version)
    peers.until(lambda: heard().get(group) == 2, "the second ring")
    peers.until(lambda: noted() == {"d/dev-a": 1, "g/g": 2}, "noted")


def test_bells_rung_while_the_broker_confirms_others_hold_nothing_up(nats_fleet, peers):
    """The client confirms with its own lock held, and takes that lock to publish: no lock of ours may lie across both."""
    fleet = nats_fleet
    fleet.start_ingest()
    with writing(fleet.engine) as connection:
        version = queries.bump_bell(connection, "g/g")
    rung = []

    def ring():
        for _ in range(3000):
            fleet.link.ring("g/g", version)
        rung.append(threading.get_ident())

    ringers = [threading.Thread(target=ring, daemon=True) for _ in range(2)]
    for ringer in ringers:
        ringer.start()
    peers.until(lambda: len(rung) == len(ringers), "every bell given to the client", 60.0)
    device = peers(peers.Sender, fleet, "dev-a").open()
    device.count(5)
    once(fleet, device, 5)
    peers.until(lambda: {row.rung_version for row in fleet.rows(select(t.bells))} == {version}, "noted")


def test_a_locked_database_holds_the_acknowledgement_back(fleet, peers):
    ingest = fleet.start_ingest()
    device = peers(peers.Sender, fleet, "dev-a").open()
    with writing(fleet.engine):
        device.count(5)
        time.sleep(1)
        assert device.pending
        assert ingest.healthy
    once(fleet, device, 5)


def test_a_server_that_is_behind_does_not_queue_again_what_comes_again(fleet, peers):
    """The device sends its records every 0.2 s for as long as they are not acknowledged."""
    ingest = fleet.start_ingest()
    device = peers(peers.Sender, fleet, "dev-a").open()
    with writing(fleet.engine):
        device.count(5, 6)
        peers.until(lambda: ingest.totals.repeated >= 8, "copies")
        assert ingest.waiting <= 2
        assert device.pending
    once(fleet, device, 11)
    assert fleet.stream("dev-a").duplicates <= 2
    # Every copy was acknowledged to the broker: it would keep them otherwise, and its window would fill.
    ingest.stop()
    ingest.totals.repeated = 0
    again = fleet.start_ingest()
    time.sleep(1)
    assert (again.totals.messages, again.waiting) == (0, 0)


def test_a_queue_bounded_in_bytes_only_slows_things_down(fleet, peers):
    ingest = fleet.start_ingest(IngestSettings(queue_bytes=1, batch_messages=1))
    devices = [peers(peers.Sender, fleet, name).open() for name in ("dev-a", "dev-b")]
    seen = set()
    with writing(fleet.engine):
        for ok in range(8):
            for device in devices:
                device.count(ok)  # each time another batch
            time.sleep(0.35)
            seen.add(ingest.waiting)
    assert max(seen) == 1, "the network thread waits for its turn"
    for device in devices:
        once(fleet, device, sum(range(8)))


def test_a_commit_that_does_not_come_shows_in_the_health(fleet, peers):
    ingest = fleet.start_ingest(IngestSettings(stuck_s=0.5))
    device = peers(peers.Sender, fleet, "dev-a").open()
    assert ingest.healthy
    with writing(fleet.engine):
        time.sleep(1)
        assert ingest.healthy, "nothing waits"
        device.count(5)
        peers.until(lambda: not ingest.healthy, "the fault")
    once(fleet, device, 5)
    peers.until(lambda: ingest.healthy, "well again")


def test_the_broker_is_patient_with_a_session_that_stands(nats_fleet):
    """It sent everything again after 60 s, to a server that was only slow, into the same queue."""
    text = nats_fleet.broker.config_file.read_text()
    assert 'ack_wait: "1800s"' in text
    assert "max_ack_pending: 1000" in text


def test_a_message_that_cannot_be_stored_does_not_stop_the_others(fleet, peers):
    ingest = fleet.start_ingest()
    with writing(fleet.engine) as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER poison BEFORE INSERT ON windows WHEN NEW.device = 'dev-a' AND NEW.seq = 1 "
            "BEGIN SELECT RAISE(ABORT, 'poison'); END"
        )
    poisoned = peers(peers.Sender, fleet, "dev-a").open()
    poisoned.count(7)
    good = peers(peers.Sender, fleet, "dev-b").open()
    good.count(*range(30))
    once(fleet, good, sum(range(30)))
    peers.until(lambda: ingest.totals.quarantined >= 1, "the poison set aside")
    assert poisoned.pending, "what was not stored was acknowledged"
    with writing(fleet.engine) as connection:
        connection.exec_driver_sql("DROP TRIGGER poison")
    once(fleet, poisoned, 7)


def test_a_queue_of_one_only_slows_things_down(fleet, peers):
    fleet.start_ingest(IngestSettings(queue_messages=1, batch_messages=1))
    devices = [peers(peers.Sender, fleet, name).open() for name in ("dev-a", "dev-b")]
    for device in devices:
        device.count(*range(100))
    for device in devices:
        once(fleet, device, sum(range(100)))
