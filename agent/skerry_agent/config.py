"""The agent's configuration: one frozen tree, read once from a TOML file and the environment.

Every key has a default but ``state_dir``. ``SKERRY_AGENT_<SECTION>_<KEY>`` overrides (``SKERRY_AGENT_STATE_DIR`` for the one key
without a section). All faults are reported together; an unknown key is a fault. What enrolment learnt
(``identity/enrolled.json``) fills what the file leaves out. No secrets stand in here: keys are files under ``identity/``.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import msgspec
from skerry_contract import ids, misfit
from skerry_contract.errors import ContractError
from skerry_contract.manifest import Runtime

from skerry_agent import clients
from skerry_agent.errors import BadConfig, Degraded

ENVIRONMENT_PREFIX = "SKERRY_AGENT_"
MOST_PATH_BYTES = 107
"""``sun_path`` of unix(7), less its terminating zero."""
MOST_THREADS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """``url`` of the device API; empty: as enrolled."""

    url: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """``url`` of the update repository; empty: as enrolled, else the server's ``/repository``."""

    url: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mqtt:
    """The broker; empty and 0: as enrolled. ``keepalive_s``: seconds."""

    host: str = ""
    port: int = 0
    keepalive_s: int = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """Where applications ask.

    Attributes:
        port: on loopback; 0 takes a free one, and ``run/serving.json`` says which; ``none``: the unix socket alone answers.
        socket: path of a unix socket that answers as well; empty for none.
        socket_mode: of its file, octal digits: who may connect.
    """

    host: str = "127.0.0.1"
    port: int | Literal["none"] = 0
    socket: str = ""
    socket_mode: str = "0660"


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Who may ask, and how often.

    Attributes:
        required: only clients that ``skerry-agent token`` knows are answered.
        rate: requests per second of each client that has no rate of its own; 0: no limit.
        burst: at once after a pause; 0: a second's worth.
        distinct: count different requests, about.
    """

    required: bool = False
    rate: float = 0.0
    burst: int = 0
    distinct: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Apps:
    """Applications that run a confirmed bundle in their own process (``skerry_agent.sdk``).

    Attributes:
        socket: of theirs; empty for ``run/apps.sock`` below the state folder, where only the agent's own user comes.
        socket_mode: of its file, octal digits.
        users: names or numbers of users that may, besides the agent's own and root.
        clients: connected at once, one for each model that an application has open; 0: no socket.
    """

    socket: str = ""
    socket_mode: str = "0660"
    users: tuple[str, ...] = ()
    clients: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Late labels.

    Attributes:
        max_age_s: a label that comes later after its prediction is counted as late; 0: no labels are taken.
        predictions: remembered per window key (model, bundle, arm, rollout, stage), 18 bytes each on disk.
        former_keys: keys under which nothing is counted any more and labels are still taken.
    """

    max_age_s: float = 86400.0
    predictions: int = 65536
    former_keys: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds.

    Attributes:
        outbox_mb: what the store may take on disk, its write-ahead log included, MB (1e6 bytes).
        outbox_free_mb: what it leaves free on its file system, as far as it can.
        uploads_in_flight: batches that the server has not acknowledged.
        upload_kib: bodies per batch, KiB; upload_kib_s: how fast batches leave, KiB/s of messages, after a long outage too; 0: as fast as the server takes them.
        max_inflight: local requests accepted at once.
        max_wait_s: longest wait of an accepted one, by what those before it should take.
        disk_reserve_mb, memory_reserve_mb: what updates must leave free; file_reserve: files (inodes) of the state folder's disk.
        leak_slack_mb: a worker may have so much memory of its own beyond what its models need before it is replaced.
    """

    outbox_mb: float = 64.0
    outbox_free_mb: float = 16.0
    uploads_in_flight: int = 4
    upload_kib: int = 64
    upload_kib_s: float = 64.0
    max_inflight: int = 64
    max_wait_s: float = 5.0
    disk_reserve_mb: float = 64.0
    file_reserve: int = 256
    memory_reserve_mb: float = 0.0
    leak_slack_mb: float = 64.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Workers that come and go.

    Attributes:
        on_demand: models that are loaded at their first request, each in a worker of its own.
        idle_s: such a worker ends when no request has come for so long; 0: never.
        warm: a worker is started ahead, so that the next one has only its models to load.
        waiting: requests that may wait for a model whose worker is not there; more are answered 503 at once.
        wait_s: so long at most.
    """

    on_demand: tuple[str, ...] = ()
    idle_s: float = 600.0
    warm: bool = False
    waiting: int = 64
    wait_s: float = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What the operator says of this device.

    Attributes:
        stratum_class: hardware class, empty for the architecture's name.
        runtimes: those that may run models here, the preferred first; empty: all that are installed, in the bundle's order.
    """

    stratum_class: str = ""
    tags: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()


class Delegate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A delegate of TFLite: its library, and options as it takes them."""

    library: str
    options: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Engines:
    """What models should run on; where that is not here or does not take a model, the CPU runs it.

    Attributes:
        threads: within one inference, on the CPU.
        onnx_providers: execution providers of ONNX Runtime, the preferred first; the CPU's need not be named.
        onnx_provider_options: by provider.
        tflite_delegates: libraries with a delegate of TFLite, and their options; used all together.
        tflite_xnnpack: whether TFLite may use the CPU kernels of XNNPACK.
    """

    threads: int = 1
    onnx_providers: tuple[str, ...] = ()
    onnx_provider_options: dict[str, dict[str, str]] = field(default_factory=dict)
    tflite_delegates: tuple[Delegate, ...] = ()
    tflite_xnnpack: bool = True

    @property
    def acceleration(self) -> dict[str, Any]:
        """The same as builtins, by the names of ``skerry_runtime.acceleration``, which is not loaded here."""
        return {
            "threads": self.threads,
            "providers": list(self.onnx_providers),
            "provider_options": self.onnx_provider_options,
            "delegates": msgspec.to_builtins(self.tflite_delegates),
            "xnnpack": self.tflite_xnnpack,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds. A value below 0 leaves the choice to the group's settings.

    Attributes:
        fold_interval_s: cut windows this often; 0: as the group's ``window_s``.
        commit_s: windows that arrive within this time share a commit to the disk; 0: each has its own.
        health_interval_s: how often the worker reports its counts.
        sync_s, jitter_s, trial_s: beat the group's settings.
        trial_inferences: beats the group's.
        drain_s: how long the old worker may finish.
        ack_s: an upload that is not acknowledged for so long is sent again.
        backoff_scale: multiplies every wait after a failure.
        courier_s: longest run of a courier that moves no files.
        silent_s: a worker that reports nothing for so long, and for five reports, hangs: it is killed and replaced.
        inference_s: so does one whose inference takes so long, and ten times what it should.
        spin_s: a worker that uses a core for so long without work is replaced.
        unserved_s: when nothing has answered for so long that should, the service manager is told no more that the agent is well.
    """

    fold_interval_s: float = 0.0
    commit_s: float = 0.5
    health_interval_s: float = 2.0
    sync_s: float = -1.0
    jitter_s: float = -1.0
    trial_s: float = -1.0
    trial_inferences: int = -1
    drain_s: float = 10.0
    ack_s: float = 30.0
    backoff_scale: float = 1.0
    courier_s: float = 120.0
    silent_s: float = 10.0
    inference_s: float = 60.0
    spin_s: float = 30.0
    unserved_s: float = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """What is counted beside requests, and traces of local inferences.

    Attributes:
        otlp_endpoint: of an OpenTelemetry collector, OTLP/HTTP, with its path (``http://127.0.0.1:4318/v1/traces``); empty: none.
        trace_share: of the requests without a ``traceparent`` header that begin a trace; those with one follow it.
        readings_s: how often the device itself is read (processor, memory, disk, temperature, power), seconds; 0: never.
        samples_per_hour: rows kept whole, of each model and reason; the group's ``sample_rate`` says whether any are.
        personal: what becomes in them of features marked ``pii``.
        encrypt: samples are encrypted on disk; rings and label books are kept below ``memory_dir``, a tmpfs.
    """

    otlp_endpoint: str = ""
    trace_share: float = 0.0
    readings_s: float = 30.0
    samples_per_hour: int = 60
    personal: Literal["drop", "hash"] = "drop"
    encrypt: bool = False
    memory_dir: str = "/dev/shm"  # noqa: S108  (only a folder of our own below it is used, its owner and mode are checked)


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """``level``: debug, info, warning or error."""

    level: str = "info"
    json: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The tree. ``state_dir`` holds all state of the agent, mode 0700."""

    state_dir: Path
    server: Server = field(default_factory=Server)
    repository: Repository = field(default_factory=Repository)
    mqtt: Mqtt = field(default_factory=Mqtt)
    serving: Serving = field(default_factory=Serving)
    access: Access = field(default_factory=Access)
    apps: Apps = field(default_factory=Apps)
    labels: Labels = field(default_factory=Labels)
    limits: Limits = field(default_factory=Limits)
    pool: Pool = field(default_factory=Pool)
    device: Device = field(default_factory=Device)
    runtime: Engines = field(default_factory=Engines)
    timing: Timing = field(default_factory=Timing)
    telemetry: Telemetry = field(default_factory=Telemetry)
    log: Log = field(default_factory=Log)

    @property
    def identity_dir(self) -> Path:
        """Keys, certificates and what enrolment learnt."""
        return self.state_dir / "identity"

    @property
    def clients_file(self) -> Path:
        """Who may ask the local endpoint, where that is bound to clients."""
        return self.state_dir / clients.FILE

    @property
    def log_file(self) -> Path:
        """The newer file of the log ring."""
        return self.state_dir / "log.jsonl"

    @property
    def run_dir(self) -> Path:
        """What lives as long as the process: control socket, addresses."""
        return self.state_dir / "run"


_SECTIONS = (
    "server",
    "repository",
    "mqtt",
    "serving",
    "access",
    "apps",
    "labels",
    "limits",
    "pool",
    "device",
    "runtime",
    "timing",
    "telemetry",
    "log",
)
_POSITIVE = {
    "limits.outbox_mb", "limits.uploads_in_flight", "limits.upload_kib", "limits.max_inflight", "limits.max_wait_s", "timing.health_interval_s",
    "timing.drain_s", "timing.ack_s", "timing.backoff_scale", "timing.courier_s", "mqtt.keepalive_s",
    "labels.predictions", "labels.former_keys", "timing.spin_s", "timing.unserved_s", "runtime.threads",
}  # fmt: skip
_NOT_NEGATIVE = {
    "apps.clients", "limits.disk_reserve_mb", "limits.memory_reserve_mb", "limits.leak_slack_mb", "pool.idle_s", "timing.fold_interval_s", "labels.max_age_s", "pool.waiting",
    "pool.wait_s", "access.rate", "access.burst", "limits.outbox_free_mb", "limits.upload_kib_s", "limits.file_reserve", "timing.commit_s", "telemetry.readings_s", "telemetry.samples_per_hour",
}  # fmt: skip
LEAST_OUTBOX_MB = 8.0
"""The log of the store alone may take 4 MB."""
LONGEST_COMMIT_S = 60.0


_PORT = "wanted a port from 0 to 65535, got {!r}"
_PORT_OR_NONE = 'wanted a port from 0 to 65535, or "none", got {!r}'


def load(path: Path, environment: Mapping[str, str]) -> Config:
    """Reads the file and the environment.

    Raises:
        BadConfig: with every fault found.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig([f"{path}: cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig([f"{path}: no TOML: {error}"]) from None
    return build(tree, environment, what=str(path))


def build(tree: Mapping[str, Any], environment: Mapping[str, str], *, what: str = "configuration") -> Config:
    """Checks a tree of builtins. Raises ``BadConfig`` with every fault."""
    faults: list[str] = []
    types = get_type_hints(Config)
    values: dict[str, Any] = {}
    for name in tree:
        if name != "state_dir" and name not in _SECTIONS:
            faults.append(f"{what}: unknown key {name!r}; wanted state_dir or one of {', '.join(_SECTIONS)}")
    for name in _SECTIONS:
        given = tree.get(name, {})
        if not isinstance(given, dict):
            faults.append(f"{what}: {name}: wanted a table, got {type(given).__name__}")
            given = {}
        values[name] = _section(name, types[name], given, environment, what, faults)
    state_dir = environment.get(f"{ENVIRONMENT_PREFIX}STATE_DIR", tree.get("state_dir"))
    if not isinstance(state_dir, str) or not state_dir:
        faults.append(f"{what}: state_dir: wanted the path of a folder, got {state_dir!r}")
    elif not Path(state_dir).is_absolute():
        faults.append(f"{what}: state_dir: wanted an absolute path, got {state_dir!r}")
    runtime = values["runtime"]
    loose = sorted(set(runtime.onnx_provider_options) - set(runtime.onnx_providers))
    if loose:
        faults.append(f"{what}: runtime.onnx_provider_options: {', '.join(loose)} is not one of runtime.onnx_providers")
    serving = values["serving"]
    if serving.port == "none" and not serving.socket:
        faults.append(f'{what}: serving.port: "none" wants a serving.socket, or nothing could ask this agent')
    if faults:
        raise BadConfig(faults)
    return Config(state_dir=Path(str(state_dir)), **values)


def _section(
    section: str, kind: Any, given: Mapping[str, Any], environment: Mapping[str, str], what: str, faults: list[str]
) -> Any:
    hints = get_type_hints(kind)
    for name in given:
        if name not in hints:
            faults.append(f"{what}: unknown key {section}.{name}; wanted one of {', '.join(sorted(hints))}")
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        variable = f"{ENVIRONMENT_PREFIX}{section.upper()}_{name.upper()}"
        where = f"{what}: {section}.{name}"
        if variable in environment:
            where = variable
            raw: Any = environment[variable]
            if hint == tuple[str, ...]:
                raw = [part for part in raw.split(",") if part]
            strict = False
        elif name in given:
            raw, strict = given[name], True
        else:
            continue
        try:
            value = msgspec.convert(raw, hint, strict=strict)
        except msgspec.ValidationError as error:
            place, words = misfit.words(error, hint, raw)
            if name == "port":
                place, words = "", (_PORT if hint is int else _PORT_OR_NONE).format(raw)
            faults.append(f"{where}{'.' if place and not place.startswith('[') else ''}{place}: {words}")
            continue
        fault = _fault(f"{section}.{name}", value)
        if fault:
            faults.append(f"{where}: {fault}")
        values[name] = value
    return kind(**values)


def _fault(key: str, value: Any) -> str | None:
    if key in _POSITIVE and not value > 0:
        return f"wanted more than 0, got {value}"
    if key in _NOT_NEGATIVE and not value >= 0:
        return f"wanted 0 or more, got {value}"
    if key == "limits.outbox_mb" and value < LEAST_OUTBOX_MB:
        return f"wanted {LEAST_OUTBOX_MB:g} or more: the log of the store may take half of it, got {value}"
    if key == "timing.commit_s" and value > LONGEST_COMMIT_S:
        return f"wanted at most {LONGEST_COMMIT_S:g}: so much of the counts may be lost when power fails, got {value}"
    if key.endswith(".port") and value != "none" and not 0 <= value <= 65535:
        return f"wanted a port from 0 to 65535, got {value}"
    if key == "telemetry.memory_dir" and not value.startswith("/"):
        return f"wanted an absolute path, got {value!r}"
    if key.endswith(".url") and value and not value.startswith("https://"):
        return f"wanted an https:// address, got {value!r}"
    if key == "serving.host" and value not in ("127.0.0.1", "::1", "localhost"):
        return f"wanted a loopback address: this endpoint has no TLS, got {value!r}"
    if key == "device.runtimes":
        known = get_args(Runtime)
        wrong = [name for name in value if name not in known]
        if wrong:
            return f"wanted some of {', '.join(known)}, got {', '.join(map(repr, wrong))}"
        if len(set(value)) != len(value):
            return f"wanted each runtime once, got {', '.join(value)}"
    if key == "runtime.threads" and value > MOST_THREADS:
        return f"wanted at most {MOST_THREADS}, got {value}"
    if key == "runtime.onnx_providers" and len(set(value)) != len(value):
        return f"wanted each provider once, got {', '.join(value)}"
    if key.endswith(".socket") and value and not (value.startswith("/") and len(value.encode()) <= MOST_PATH_BYTES):
        return f"wanted an absolute path of at most {MOST_PATH_BYTES} bytes, got {value!r}"
    if key.endswith(".socket_mode") and re.fullmatch("0?[0-7]{3}", value) is None:
        return f"wanted octal digits as 0660, got {value!r}"
    if key == "telemetry.otlp_endpoint" and value and not value.startswith(("http://", "https://")):
        return f"wanted an http:// or https:// address, got {value!r}"
    if key == "telemetry.trace_share" and not 0 <= value <= 1:
        return f"wanted a share from 0 to 1, got {value}"
    if key == "log.level" and value not in ("debug", "info", "warning", "error"):
        return f"wanted debug, info, warning or error, got {value!r}"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What enrolment left under ``identity/``, with the addresses that the configuration overrides."""

    device: ids.DeviceId
    group: ids.GroupName
    server_url: str
    repository_url: str
    mqtt_host: str
    mqtt_port: int
    key: Path
    certificate: Path
    fleet_ca: Path


class _MqttAddress(msgspec.Struct, frozen=True):
    host: str
    port: int


class _Enrolled(msgspec.Struct, frozen=True):
    device_id: str
    group: str
    server_url: str
    mqtt: _MqttAddress
    repository_url: str = ""


def identity(config: Config) -> Identity:
    """Reads who this device is.

    Raises:
        Degraded: ``not_enrolled``, or ``identity_damaged`` when a file is missing or wrong.
    """
    folder = config.identity_dir
    path = folder / "enrolled.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Enrolled)
        device, group = ids.device_id(found.device_id), ids.group_name(found.group)
    except FileNotFoundError:
        raise Degraded(
            "not_enrolled", f"{path} is not there", advice="run: skerry-agent enrol --config FILE --token TOKEN"
        ) from None
    except (OSError, msgspec.DecodeError, ContractError) as error:
        raise Degraded("identity_damaged", f"{path}: {error}", advice="enrol the device again") from None
    files = {name: folder / name for name in ("device.key", "device.pem", "fleet-ca.pem")}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise Degraded("identity_damaged", f"{folder}: no {', '.join(missing)}", advice="enrol the device again")
    server_url = (config.server.url or found.server_url).rstrip("/")
    repository_url = (
        config.repository.url or ("" if config.server.url else found.repository_url) or f"{server_url}/repository"
    )
    return Identity(
        device=device,
        group=group,
        server_url=server_url,
        repository_url=repository_url.rstrip("/"),
        mqtt_host=config.mqtt.host or found.mqtt.host,
        mqtt_port=config.mqtt.port or found.mqtt.port,
        key=files["device.key"],
        certificate=files["device.pem"],
        fleet_ca=files["fleet-ca.pem"],
    )


def as_toml_keys() -> tuple[str, ...]:
    """Every key that the file may hold, dotted, sorted: for the reference page and its test."""
    hints = get_type_hints(Config)
    keys = [f"{section}.{f.name}" for section in _SECTIONS for f in dataclasses.fields(hints[section])]
    return ("state_dir", *sorted(keys))
