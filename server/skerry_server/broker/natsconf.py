"""The embedded broker's configuration as text: a pure function of its settings and of who may connect.

Rights come from ``skerry_contract.topics`` alone. No device has a right on ``$MQTT`` or ``$JS``: with one it could write
another's message into the broker's own streams. Every user is bound to MQTT connections, so that nobody, the server
included, is let in at the broker's own protocol port.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from skerry_contract import ids, topics, wire

MAX_PENDING_ACKS = 1000
"""Messages that the broker sends to one subscription before it waits for their acknowledgement: two batches of ingest."""
ACK_WAIT_S = 1800
"""When the broker sends again what a *standing* session has not acknowledged. A server that is behind must not get more work
for it; what a dead session held, its devices send again."""
MAX_PAYLOAD_BYTES = 2 * wire.MAX_MESSAGE_BYTES
"""Greatest message that the broker takes; ingest refuses and counts what lies between its own limit and this."""

LOG_FILES = 3

_MEMORY_STORE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Listener:
    """Where the broker listens, with which certificate, and where it keeps its streams.

    Attributes:
        client_port: of the broker's own protocol, on loopback; it cannot be turned off, but no user may use it.
        sync_interval_s: how often the streams are flushed to disk; a power cut may cost what came since, and the devices
            and the server send it again.
        max_store_bytes: bound of the streams; past it the broker refuses what is to be kept.
        log_file, log_bytes: where the broker writes its log; a full one is put aside, and ``LOG_FILES`` are kept in all.
    """

    host: str
    port: int
    client_port: int
    ca_file: Path
    certificate_file: Path
    key_file: Path
    store_dir: Path
    log_file: Path
    log_bytes: int = 8 << 20
    sync_interval_s: int = 60
    max_store_bytes: int = 8 << 30


class Client(NamedTuple):
    """A device that may connect.

    Attributes:
        key_sha256: of its public key: only a certificate that names this key is let in. Empty for a certificate from before
            certificates named keys: then any of the device's lets in.
    """

    device: str
    key_sha256: str = ""


def render(listener: Listener, clients: Iterable[Client]) -> str:
    """The configuration file for these devices.

    Raises:
        Malformed: when an id or a key's digest breaks the grammar; nothing unquoted can get into the file.
    """
    tls = (
        f"{{ cert_file: {_text(listener.certificate_file)}, key_file: {_text(listener.key_file)}, "
        f"ca_file: {_text(listener.ca_file)}, verify_and_map: true, timeout: 10 }}"
    )
    users = [
        _user(ids.SERVER_IDENTITY, (f"{topics.ROOT.replace('/', '.')}.>",), (f"{topics.ROOT.replace('/', '.')}.>",))
    ]
    users += [_device(client) for client in sorted(set(clients))]
    lines = (
        'server_name: "skerry"',
        'host: "127.0.0.1"',
        f"port: {listener.client_port}",
        f"tls {tls}",
        f"max_payload: {MAX_PAYLOAD_BYTES}",
        "max_connections: 200000",
        f"log_file: {_text(listener.log_file)}",
        f"logfile_size_limit: {listener.log_bytes}",
        f"logfile_max_num: {LOG_FILES}",
        "jetstream {",
        f"  store_dir: {_text(listener.store_dir)}",
        f'  sync_interval: "{listener.sync_interval_s}s"',
        f"  max_file_store: {listener.max_store_bytes}",
        f"  max_memory_store: {_MEMORY_STORE_BYTES}",
        "}",
        "mqtt {",
        f"  host: {_text(listener.host)}",
        f"  port: {listener.port}",
        f"  max_ack_pending: {MAX_PENDING_ACKS}",
        f'  ack_wait: "{ACK_WAIT_S}s"',
        f"  tls {tls}",
        "}",
        "authorization {",
        "  timeout: 10",
        "  users: [",
        *(f"    {user}" for user in users),
        "  ]",
        "}",
    )
    return "\n".join(lines) + "\n"


def _device(client: Client) -> str:
    device = ids.device_id(client.device)
    return _user(
        # The broker looks for a user among a certificate's DNS names first, and then among its URIs. Where the key names the
        # user, the id is none, so a certificate of another key of the same device finds nobody.
        ids.key_uri(ids.sha256_hex(client.key_sha256)) if client.key_sha256 else device,
        tuple(topics.nats_subject(topic) for topic in topics.device_may_publish(device)),
        tuple(topics.nats_subject(topic) for topic in topics.device_may_read(device)),
    )


def _user(name: str, publish: tuple[str, ...], subscribe: tuple[str, ...]) -> str:
    return (
        f'{{ user: {_text(name)}, allowed_connection_types: ["MQTT"], permissions: {{ '
        f"publish: {{ allow: {json.dumps(publish)} }}, subscribe: {{ allow: {json.dumps(subscribe)} }} }} }}"
    )


def _text(value: object) -> str:
    return json.dumps(str(value))
