"""Records between the device and a server that is deaf, away, restored, or ahead. Real broker, real agent."""

from __future__ import annotations

import time

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from skerry_contract import topics, wire

from tests.integration.agent.rig import DEVICE, Broker, Device, Server, wait_for


@pytest.fixture
def serving(device: Device, server: Server) -> Device:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    wait_for(lambda: server.inferences() == 20 and device.status()["outbox"]["pending"] == 0, why="a quiet start")
    return device


def test_what_a_deaf_server_missed_is_sent_again_and_taken_once(serving: Device, server: Server) -> None:
    server.deaf = True
    serving.infer(9)
    wait_for(lambda: server.missed > 0, why="records that the server did not hear")
    assert serving.status()["outbox"]["pending"] > 0
    server.deaf = False
    wait_for(lambda: server.inferences() == 29, why=f"29 counted, got {server.inferences()}")
    wait_for(lambda: serving.status()["outbox"]["pending"] == 0, why="an empty outbox")
    assert server.conflicts == []


def test_the_broker_alone_frees_nothing(serving: Device, server: Server) -> None:
    server.deaf = True
    serving.infer(9)
    wait_for(lambda: serving.status()["outbox"]["pending_inferences"] == 9, why="nine that wait")
    # Twice: the broker confirmed the first one before the device sent it again.
    missed = server.missed
    wait_for(lambda: server.missed > missed + 1, why="records that the server did not hear")
    assert serving.status()["outbox"]["pending_inferences"] == 9


def test_while_the_server_is_offline_only_birth_and_will_are_published(serving: Device, server: Server) -> None:
    server.announce("offline")
    wait_for(lambda: not serving.status()["link"]["server_online"], why="offline heard")
    batches = len(server.received)
    serving.infer(9)
    time.sleep(1.0)
    assert len(server.received) == batches
    server.birth += 1
    server.announce("online")
    wait_for(lambda: server.inferences() == 29, why=f"29 counted, got {server.inferences()}")


def test_a_late_will_of_the_server_before_does_not_silence_the_device(serving: Device, server: Server) -> None:
    server.birth = 5
    server.announce("online")
    server.birth = 4
    server.announce("offline")
    time.sleep(0.3)
    serving.infer(9)
    wait_for(lambda: server.inferences() == 29, why=f"29 counted, got {server.inferences()}")


def test_a_server_ahead_of_the_outbox_makes_a_new_epoch_and_loses_nothing(serving: Device, server: Server) -> None:
    epoch = serving.status()["outbox"]["epoch"]
    server.deaf = True
    server.announce("offline")
    wait_for(lambda: not serving.status()["link"]["server_online"], why="offline heard")
    serving.infer(9)
    wait_for(lambda: serving.status()["outbox"]["pending_inferences"] == 9, why="nine that wait")
    server.ack(epoch, 10_000)
    wait_for(lambda: serving.status()["outbox"]["epoch"] != epoch, why="a new epoch")
    server.deaf = False
    server.birth += 1
    server.announce("online")
    # What waited keeps its epoch and seq, so that the server can tell by digest what it holds; what follows has the new one.
    wait_for(lambda: server.inferences() == 29, why=f"29 counted, got {server.inferences()}")
    serving.infer(1)
    wait_for(lambda: server.inferences() == 30, why=f"30 counted, got {server.inferences()}")
    assert {e for e, _ in server.taken} == {epoch, serving.status()["outbox"]["epoch"]}


def test_a_restored_state_folder_does_not_overwrite_what_the_server_holds(serving: Device, server: Server) -> None:
    """The outbox is restored from a backup: its next seqs are known to the server with other contents."""
    serving.stop()
    database = serving.state_dir / "state.db"
    backup = database.read_bytes()
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    serving.infer(9)
    wait_for(lambda: server.inferences() == 29, why="29 counted")
    serving.stop()
    for suffix in ("-wal", "-shm"):
        (serving.state_dir / f"state.db{suffix}").unlink(missing_ok=True)
    database.write_bytes(backup)
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    serving.infer(6)
    wait_for(lambda: server.inferences() == 35, why=f"35 counted, got {server.inferences()}: {serving.log()[-3000:]}")
    wait_for(lambda: serving.status()["outbox"]["pending"] == 0, why="an empty outbox")


def test_an_older_birth_on_the_own_state_topic_is_answered_with_the_present_one(
    serving: Device, server: Server, broker: Broker
) -> None:
    old = wire.encode(wire.State(status="offline", birth=0))
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    client.publish(topics.state(DEVICE), old, qos=1, retain=True).wait_for_publish(5)
    client.disconnect()
    client.loop_stop()
    wait_for(lambda: server.states[-1].status == "online" and server.states[-1].birth >= 1, why="online again")


@pytest.mark.parametrize("birth", [(1 << 63) - 1, (1 << 64) - 1])
def test_a_birth_that_a_broker_made_up_mutes_the_device_neither_now_nor_after_a_restart(
    serving: Device, server: Server, broker: Broker, birth: int
) -> None:
    before = serving.status()["link"]["birth"]
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    said = wire.encode(wire.State(status="offline", birth=birth))
    client.publish(topics.state(DEVICE), said, qos=1, retain=True).wait_for_publish(5)
    client.disconnect()
    client.loop_stop()
    wait_for(lambda: "a birth that cannot be is retained" in serving.log(), why="a look at what is retained")
    wait_for(
        lambda: (server.states[-1].status, server.states[-1].birth) == ("online", before), why="its own birth again"
    )
    serving.kill()
    serving.start()
    wait_for(
        lambda: server.states[-1].status == "online" and before < server.states[-1].birth < before + 100,
        why="the next birth",
    )


def test_a_killed_device_is_offline_by_its_will_with_its_birth(serving: Device, server: Server) -> None:
    birth = serving.status()["link"]["birth"]
    serving.kill()
    wait_for(lambda: server.states[-1].status == "offline", why="the will")
    assert server.states[-1].birth == birth
    serving.start()
    wait_for(lambda: server.states[-1].status == "online" and server.states[-1].birth > birth, why="a later birth")


def test_a_malformed_message_from_the_broker_changes_nothing(serving: Device, server: Server) -> None:
    for topic in (topics.ack(DEVICE), topics.bell(DEVICE), topics.SERVER_STATE):
        server.client.publish(topic, b"\xff\xff not a message", qos=1)
    server.client.publish(topics.ack(DEVICE), b"", qos=1)
    time.sleep(0.3)
    serving.infer(9)
    wait_for(lambda: server.inferences() == 29, why=f"29 counted, got {server.inferences()}")


@pytest.mark.attack("replayed bell")
def test_the_same_bell_twice_is_one_sync(serving: Device, server: Server) -> None:
    before_ms = serving.status()["sync"]["at_ms"]
    server.ring(3)
    second = serving.bundle("1.1.0", seed=1)
    serving.wait_synced(before_ms)
    serving.publish(second)
    server.ring(3)
    time.sleep(0.5)
    assert serving.running()[0] == "1.0.0"
    server.ring(4)
    serving.wait_running("1.1.0", "trial")
