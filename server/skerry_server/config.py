"""The server's configuration: one frozen tree, read once from ``<data>/server.toml`` and the environment.

Every key has a default. The environment wins over the file, the command line over both: ``SKERRY_SERVER_<SECTION>_<KEY>``, for
example ``SKERRY_SERVER_ROLLOUT_TICK_S=0.5``. Unknown keys are errors, and all faults are reported together.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
from skerry_contract import ids, misfit
from skerry_contract.errors import ContractError

from skerry_server.errors import BadSettings

FILE_NAME = "server.toml"
ENVIRONMENT_PREFIX = "SKERRY_SERVER_"

Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_536_000)]
Megabytes = Annotated[int, msgspec.Meta(ge=1, le=1_048_576)]

_HOST_NAME = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTPS listener.

    Attributes:
        name: what the API and the pages call this fleet.
        host: address to listen on; port: 0 for the one used last time, else a free one.
        public_host: name or address under which devices and people reach this server; certificates and answers carry it.
        public_names: further names for the server's certificate.
        certificate_check_s: how often the server's own certificates are looked at; they are renewed 60 days before their end.
    """

    name: str = "skerry"
    host: str = "127.0.0.1"
    port: Port = 0
    public_host: str = "127.0.0.1"
    public_names: tuple[str, ...] = ()
    certificate_check_s: Seconds = 3600.0


class Mqtt(msgspec.Struct, frozen=True, kw_only=True):
    """The embedded broker's listener, on ``server.host``. ``port`` 0: as last time, else a free one."""

    port: Port = 0


class Address(NamedTuple):
    """Where a broker takes MQTT over TLS."""

    host: str
    port: int


class Broker(msgspec.Struct, frozen=True, kw_only=True):
    """The MQTT broker.

    Attributes:
        kind: ``embedded``: a child of this server; ``external``: one that runs by itself.
        url: of the external one for this server, ``mqtts://host:port``; public_url: for devices, empty for ``url``.
        ca_file: CA of the broker's certificate; empty for the fleet's own, which is the one that devices trust.
        certificate_file, key_file: with which this server connects, identity ``_server``; empty for those of the fleet's CA.
    """

    kind: Literal["embedded", "external"] = "embedded"
    url: str = ""
    public_url: str = ""
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""

    @property
    def own(self) -> Address:
        """Where this server finds the external broker."""
        return read_mqtts(self.url)

    @property
    def public(self) -> Address:
        """Where devices find it."""
        return read_mqtts(self.public_url or self.url)


class Database(msgspec.Struct, frozen=True, kw_only=True):
    """``url``: SQLAlchemy's; empty for SQLite in ``<data>/server.db``."""

    url: str = ""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What is accepted.

    Attributes:
        body_mb: any request but a blob; blob_mb: one file of a bundle.
        nonces: unused ones kept.
        connections: HTTPS connections at a time; 0 for as many as open files are allowed, with a reserve.
        first_request_s: for a connection's TLS handshake and the head of its first request together.
        stall_s: how long a request's body may bring nothing. A body other than a blob's has four times that in all, and so has
            the reader of an answer to take the next part of it.
    """

    body_mb: Megabytes = 8
    blob_mb: Megabytes = 4096
    nonces: Annotated[int, msgspec.Meta(ge=10, le=10_000_000)] = 100_000
    connections: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    first_request_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 15.0
    stall_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 30.0


class Rollouts(msgspec.Struct, frozen=True, kw_only=True):
    """The orchestrator.

    Attributes:
        tick_s: how often it looks at the evidence.
        seen_s: a device that was heard of within this span may be counted on when a stage is cut.
        resign_s: how often expiring metadata is looked for.
        speak_s: after this server has come to its broker, devices that have not spoken within that time are offline.
    """

    tick_s: Annotated[float, msgspec.Meta(ge=0.05, le=3600)] = 2.0
    seen_s: Seconds = 86_400.0
    resign_s: Seconds = 60.0
    speak_s: Seconds = 120.0


class Telemetry(msgspec.Struct, frozen=True, kw_only=True):
    """``bucket_s``: how finely what devices count is kept in time; drift is looked for as often."""

    bucket_s: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 300.0


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """When a difference from the reference is drift.

    Attributes:
        min_rows: values that are compared at least; fewer wait for more.
        psi: corrected population stability index; shift_sd: of a mean, in standard deviations of the reference.
        null_rate, outside_rate: shares of nulls more than in the reference, of values outside the plausible range.
        false_rate: false discovery rate over the features and outputs of one look.
        persist, of: so many of so many spans must have drifted.
        lookback_s: how far back spans are gathered.
    """

    min_rows: Annotated[int, msgspec.Meta(ge=20, le=1 << 40)] = 200
    psi: Annotated[float, msgspec.Meta(gt=0, le=100)] = 0.1
    shift_sd: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 0.5
    null_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.05
    outside_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.05
    false_rate: Annotated[float, msgspec.Meta(gt=0, le=0.5)] = 0.01
    persist: Annotated[int, msgspec.Meta(ge=1, le=50)] = 3
    of: Annotated[int, msgspec.Meta(ge=1, le=50)] = 5
    lookback_s: Seconds = 604_800.0


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """The child process that validates bundles."""

    timeout_s: Seconds = 120.0
    memory_mb: Megabytes = 4096


class Deltas(msgspec.Struct, frozen=True, kw_only=True):
    """What is made so that devices fetch less than whole files.

    Attributes:
        enabled: whether any are made; what was made before is served all the same.
        look_s: how often what devices run is compared with what they are or soon may be given.
        timeout_s, memory_mb: of the child process that makes one.
        quota_mb: of all that are served; those that nobody wants go first.
    """

    enabled: bool = True
    look_s: Annotated[float, msgspec.Meta(ge=0.05, le=86_400)] = 30.0
    timeout_s: Seconds = 900.0
    memory_mb: Megabytes = 4096
    quota_mb: Megabytes = 10_240


EVERY_MODEL = "*"


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What bundles must be.

    Attributes:
        model_signers: files with public keys (PEM, P-256), below the data folder when relative; a bundle must be signed by one.
        encrypted_models: names of models whose bundles must be encrypted; ``*`` for all.
    """

    model_signers: tuple[str, ...] = ()
    encrypted_models: tuple[str, ...] = ()


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """Devices.

    Attributes:
        clock_skew_s: by how much a device's clock may differ in signed requests.
        nonce_s: how long a nonce lives.
        renewal_grace_s: how long after its end a device's certificate may still be renewed by who has its key. Later it takes
            an operator's word, `skerry device renew`.
    """

    clock_skew_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 60.0
    nonce_s: Seconds = 120.0
    renewal_grace_s: Annotated[float, msgspec.Meta(ge=0, le=315_576_000)] = 63_072_000.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. ``data``: the folder that holds everything this server keeps."""

    data: Path
    server: Server = Server()
    mqtt: Mqtt = Mqtt()
    broker: Broker = Broker()
    database: Database = Database()
    limits: Limits = Limits()
    rollout: Rollouts = Rollouts()
    telemetry: Telemetry = Telemetry()
    drift: Drift = Drift()
    validation: Validation = Validation()
    deltas: Deltas = Deltas()
    policy: Policy = Policy()
    devices: Devices = Devices()

    @property
    def database_url(self) -> str:
        """The configured database, or SQLite in the data folder."""
        return self.database.url or f"sqlite:///{self.data / 'server.db'}"


SECTIONS: dict[str, type[msgspec.Struct]] = {
    "server": Server,
    "mqtt": Mqtt,
    "broker": Broker,
    "database": Database,
    "limits": Limits,
    "rollout": Rollouts,
    "telemetry": Telemetry,
    "drift": Drift,
    "validation": Validation,
    "deltas": Deltas,
    "policy": Policy,
    "devices": Devices,
}


def load(
    data: Path, environment: Mapping[str, str], overrides: Mapping[tuple[str, str], Any] | None = None
) -> Settings:
    """Reads the configuration of the server that lives in ``data``.

    Args:
        environment: usually ``os.environ``.
        overrides: (section, key) -> value, from the command line; None values are ignored.

    Raises:
        BadSettings: with every fault found.
    """
    faults: list[str] = []
    values: dict[str, dict[str, tuple[str, Any, bool]]] = {name: {} for name in SECTIONS}
    _read_file(data / FILE_NAME, values, faults)
    _read_environment(environment, values, faults)
    for (section, key), value in (overrides or {}).items():
        if value is not None:
            values[section][key] = (f"option {section}.{key}", value, True)
    built = {name: _build(kind, values[name], faults) for name, kind in SECTIONS.items()}
    settings = msgspec.convert({"data": data.absolute()} | built, Settings)
    faults += _check(settings)
    if faults:
        raise BadSettings(faults)
    return settings


def _read_file(path: Path, values: dict[str, dict[str, tuple[str, Any, bool]]], faults: list[str]) -> None:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        faults.append(f"{path}: wanted TOML: {error}")
        return
    for section, content in document.items():
        if section not in SECTIONS:
            faults.append(f"{path}: unknown section [{section}]; there are {', '.join(SECTIONS)}")
        elif not isinstance(content, dict):
            faults.append(f"{path}: {section}: wanted a section, got {type(content).__name__}")
        else:
            for key, value in content.items():
                values[section][key] = (f"{path}: {section}.{key}", value, False)


def _read_environment(
    environment: Mapping[str, str], values: dict[str, dict[str, tuple[str, Any, bool]]], faults: list[str]
) -> None:
    for name, value in environment.items():
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        section, _, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("_")
        if section not in SECTIONS:
            faults.append(f"environment {name}: unknown section {section!r}; there are {', '.join(SECTIONS)}")
            continue
        listed = SECTIONS[section].__annotations__.get(key, "").startswith("tuple")
        values[section][key] = (f"environment {name}", value.split(",") if listed else value, True)


def _build(kind: type[msgspec.Struct], found: dict[str, tuple[str, Any, bool]], faults: list[str]) -> msgspec.Struct:
    kinds = {field.name: field.type for field in msgspec.structs.fields(kind)}
    good: dict[str, Any] = {}
    for key, (where, value, from_text) in found.items():
        if key not in kinds:
            faults.append(f"{where}: unknown key; there are {', '.join(kinds)}")
            continue
        try:
            good[key] = msgspec.convert(value, kinds[key], strict=not from_text)
        except msgspec.ValidationError as error:
            place, words = misfit.words(error, kinds[key], value)
            faults.append(f"{where}{'.' if place and not place.startswith('[') else ''}{place}: {words}")
    return kind(**good)


def _check(settings: Settings) -> list[str]:
    faults = []
    for model in sorted({*settings.policy.encrypted_models} - {EVERY_MODEL}):
        try:
            ids.model_name(model)
        except ContractError as error:
            faults.append(f"policy.encrypted_models: wanted names of models, or {EVERY_MODEL}: {error}")
    if settings.drift.persist > settings.drift.of:
        faults.append(f"drift.persist: wanted at most drift.of ({settings.drift.of}), got {settings.drift.persist}")
    try:
        ipaddress.ip_address(settings.server.host)
    except ValueError:
        faults.append(f"server.host: wanted an IP address to listen on, got {settings.server.host!r}")
    for name in (settings.server.public_host, *settings.server.public_names):
        try:
            ipaddress.ip_address(name)
        except ValueError:
            if _HOST_NAME.fullmatch(name) is None:
                faults.append(f"server: wanted a host name or an IP address, got {name!r}")
    return faults + _check_broker(settings)


def read_mqtts(url: str) -> Address:
    """Reads ``mqtts://host:port``.

    Raises:
        ValueError: it is anything else.
    """
    found = urlsplit(url)
    plain = found.path in ("", "/") and not found.query and not found.fragment and "@" not in found.netloc
    if found.scheme != "mqtts" or not found.hostname or not found.port or not plain:
        raise ValueError(f"wanted mqtts://host:port, got {url!r}")
    return Address(found.hostname, found.port)


def _check_broker(settings: Settings) -> list[str]:
    broker = settings.broker
    if broker.kind == "embedded":
        given = [
            name for name in ("url", "public_url", "ca_file", "certificate_file", "key_file") if getattr(broker, name)
        ]
        return [f"broker.{name}: only an external broker has one; wanted broker.kind external" for name in given]
    faults = []
    for name in ("url", "public_url"):
        value = getattr(broker, name)
        try:
            if value or name == "url":
                read_mqtts(value)
        except ValueError as error:
            faults.append(f"broker.{name}: {error}")
    for name in ("ca_file", "certificate_file", "key_file"):
        value = getattr(broker, name)
        if value and not (settings.data / value).is_file():
            faults.append(f"broker.{name}: wanted a file, got {value!r}")
    if bool(broker.certificate_file) != bool(broker.key_file):
        faults.append("broker: certificate_file and key_file belong together: wanted both or neither")
    if settings.mqtt.port:
        faults.append("mqtt.port: the embedded broker's; with broker.kind external wanted broker.url alone")
    return faults
