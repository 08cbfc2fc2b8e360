"""What can be configured: one frozen tree, every key with its default but ``state_dir``. Reading and checking it is ``config``'s."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from skerry_agent import clients


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
class Network:
    """What the group's rules about networks go by.

    Attributes:
        type: of the network that this device is on; ``auto``: as the default route's interface shows.
        metered: whether it is paid by volume; ``auto``: where it is cellular.
    """

    type: Literal["auto", "ethernet", "wifi", "cellular"] = "auto"
    metered: Literal["auto", "yes", "no"] = "auto"


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
        distinct_most: of one client in a day; more is reported. 0: any.
    """

    required: bool = False
    rate: float = 0.0
    burst: int = 0
    distinct: bool = False
    distinct_most: int = 0


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
        standby: while a bundle is on trial, what ran before is kept loaded beside it, where memory allows.
        waiting: requests that may wait for a model whose worker is not there; more are answered 503 at once.
        wait_s: so long at most.
    """

    on_demand: tuple[str, ...] = ()
    idle_s: float = 600.0
    warm: bool = False
    standby: bool = True
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
class Updates:
    """When another bundle may begin to answer.

    Attributes:
        activate: ``auto``: once it is here and nothing holds it; ``command``: once a person says ``skerry-agent activate``.
        clock: whose time the group's windows go by: ``synced``: the kernel's, when it calls it synchronised; ``wall``: as it is.
        lock_s: the longest time that an application may lock updates for, seconds.
        import_age_s: so long after its date a folder may still be imported (``skerry-agent import``), seconds.
    """

    activate: Literal["auto", "command"] = "auto"
    clock: Literal["synced", "wall"] = "synced"
    lock_s: float = 86_400.0
    import_age_s: float = 30 * 86_400.0


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
class Encryption:
    """How this device opens encrypted models.

    Attributes:
        key: where its encryption key lies: ``file``, or a PKCS#11 URI (``pkcs11:token=...;object=...?module-path=...&pin-source=...``).
        memory_dir: a tmpfs; models lie in the clear in a folder of ours below it, and nowhere else.
    """

    key: str = "file"
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
    network: Network = field(default_factory=Network)
    serving: Serving = field(default_factory=Serving)
    access: Access = field(default_factory=Access)
    apps: Apps = field(default_factory=Apps)
    labels: Labels = field(default_factory=Labels)
    limits: Limits = field(default_factory=Limits)
    pool: Pool = field(default_factory=Pool)
    device: Device = field(default_factory=Device)
    runtime: Engines = field(default_factory=Engines)
    timing: Timing = field(default_factory=Timing)
    updates: Updates = field(default_factory=Updates)
    telemetry: Telemetry = field(default_factory=Telemetry)
    encryption: Encryption = field(default_factory=Encryption)
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
