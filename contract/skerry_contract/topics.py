"""The MQTT topic grammar. Topics are built and parsed here only.

| topic | who publishes |
|---|---|
| ``skerry/1/d/<device>/up`` | device |
| ``skerry/1/d/<device>/state`` | device, retained |
| ``skerry/1/d/<device>/ack`` | server |
| ``skerry/1/d/<device>/bell`` | server, retained |
| ``skerry/1/g/<group>/bell`` | server, retained |
| ``skerry/1/server/state`` | server, retained, with will |
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from skerry_contract import ids
from skerry_contract.errors import Malformed

ROOT = "skerry/1"
SERVER_STATE = f"{ROOT}/server/state"
ALL_UP = f"{ROOT}/d/+/up"
ALL_STATE = f"{ROOT}/d/+/state"
ALL_GROUP_BELLS = f"{ROOT}/g/+/bell"

DeviceLeaf = Literal["up", "ack", "state", "bell"]
_LEAVES: tuple[DeviceLeaf, ...] = ("up", "ack", "state", "bell")


class DeviceTopic(NamedTuple):
    """A topic below one device."""

    device: ids.DeviceId
    leaf: DeviceLeaf


def up(device: ids.DeviceId) -> str:
    """Where a device publishes its records."""
    return f"{ROOT}/d/{device}/up"


def ack(device: ids.DeviceId) -> str:
    """Where the server says what it has committed."""
    return f"{ROOT}/d/{device}/ack"


def state(device: ids.DeviceId) -> str:
    """Where a device keeps its birth and its will, retained."""
    return f"{ROOT}/d/{device}/state"


def bell(device: ids.DeviceId) -> str:
    """Where the server rings one device, retained."""
    return f"{ROOT}/d/{device}/bell"


def group_bell(group: ids.GroupName) -> str:
    """Where the server rings a group, retained."""
    return f"{ROOT}/g/{group}/bell"


def parse_device_topic(topic: str) -> DeviceTopic:
    """Splits a topic below a device.

    Raises:
        Malformed: when it is no such topic, or the id breaks the grammar.
    """
    parts = topic.split("/")
    if len(parts) != 5 or parts[0] != "skerry" or parts[1] != "1" or parts[2] != "d":
        raise Malformed("topic", f"wanted {ROOT}/d/<device>/<leaf>, got {topic[:100]!r}")
    for leaf in _LEAVES:
        if parts[4] == leaf:
            return DeviceTopic(ids.device_id(parts[3]), leaf)
    raise Malformed("topic", f"wanted one of {', '.join(_LEAVES)}, got {parts[4][:40]!r}")


def device_may_publish(device: ids.DeviceId) -> tuple[str, ...]:
    """Exactly the topics a device may publish."""
    return up(device), state(device)


def device_may_read(device: ids.DeviceId) -> tuple[str, ...]:
    """Exactly the topic filters a device may subscribe to."""
    return ack(device), bell(device), state(device), ALL_GROUP_BELLS, SERVER_STATE


def nats_subject(topic_filter: str) -> str:
    """The NATS subject of an MQTT topic filter: ``/`` becomes ``.`` and ``+`` becomes ``*``.

    Raises:
        Malformed: for a filter that holds ``#``, ``.``, ``*``, ``>``, white space or an empty level; none of ours does.
    """
    if any(c in topic_filter for c in "#.*> \t") or "" in topic_filter.split("/"):
        raise Malformed("topic filter", f"cannot be a NATS subject: {topic_filter[:100]!r}")
    return topic_filter.replace("/", ".").replace("+", "*")
