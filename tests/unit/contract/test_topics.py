"""The topic grammar, and exactly what a device may do with it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import ids, topics
from skerry_contract.errors import ContractError, Malformed

from tests.unit.contract import values

BUILDERS = {"up": topics.up, "ack": topics.ack, "state": topics.state, "bell": topics.bell}


@given(values.names, st.sampled_from(sorted(BUILDERS)))
def test_what_is_built_is_parsed(name: str, leaf: str) -> None:
    assert topics.parse_device_topic(BUILDERS[leaf](ids.DeviceId(name))) == (name, leaf)


@pytest.mark.parametrize(
    "topic",
    [
        "", "skerry/1/d/x", "skerry/1/d/x/up/", "/skerry/1/d/x/up", "skerry/2/d/x/up", "skerry/1/g/x/up", "skerry/1/d/X/up",
        "skerry/1/d//up", "skerry/1/d/+/up", "skerry/1/d/#/up", "skerry/1/d/x/down", "skerry/1/d/x/up ", "skerry/1/d/_server/up",
        "skerry/1/d/x.y/up", "$MQTT/msgs/x", "skerry/1/server/state", "skerry/1/d/x\n/up", "skerry/1/d/" + "a" * 64 + "/up",
    ],
)  # fmt: skip
def test_another_topic_is_refused(topic: str) -> None:
    with pytest.raises(Malformed):
        topics.parse_device_topic(topic)


@given(st.text(max_size=60))
def test_no_topic_raises_anything_but_a_contract_error(topic: str) -> None:
    try:
        topics.parse_device_topic(topic)
    except ContractError:
        pass


def test_a_device_publishes_two_topics_and_reads_five() -> None:
    device = ids.device_id("pump-1")
    assert topics.device_may_publish(device) == ("skerry/1/d/pump-1/up", "skerry/1/d/pump-1/state")
    assert topics.device_may_read(device) == (
        "skerry/1/d/pump-1/ack",
        "skerry/1/d/pump-1/bell",
        "skerry/1/d/pump-1/state",
        "skerry/1/g/+/bell",
        "skerry/1/server/state",
    )


@given(values.names, values.names)
def test_no_right_of_one_device_covers_a_topic_of_another(mine: str, other: str) -> None:
    rights = {*topics.device_may_publish(ids.DeviceId(mine)), *topics.device_may_read(ids.DeviceId(mine))}
    if mine != other:
        assert rights.isdisjoint({build(ids.DeviceId(other)) for build in BUILDERS.values()})


@pytest.mark.parametrize(
    ("topic", "subject"),
    [
        ("skerry/1/d/pump-1/up", "skerry.1.d.pump-1.up"),
        (topics.ALL_UP, "skerry.1.d.*.up"),
        (topics.ALL_GROUP_BELLS, "skerry.1.g.*.bell"),
        (topics.SERVER_STATE, "skerry.1.server.state"),
    ],
)
def test_topics_map_to_subjects_of_nats(topic: str, subject: str) -> None:
    assert topics.nats_subject(topic) == subject


@pytest.mark.parametrize("topic", ["a/#", "a.b/c", "a/*", "a/>", "a b", "a\tb", "a//b", "/a", "a/", ""])
def test_a_topic_that_nats_would_read_otherwise_is_refused(topic: str) -> None:
    with pytest.raises(Malformed, match="cannot be a NATS subject"):
        topics.nats_subject(topic)
