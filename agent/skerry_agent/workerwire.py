"""What supervisor and worker say to each other. ``channel`` carries it.

Both ends are on one device, of one version and one user: a message that does not parse is a bug.

Lifecycle of a worker::

    warm?                            a spare: the runtimes are loaded, no model is
    start -> loading* (ready | failed)    models loaded and proved; nothing is accepted before ``ready``
    listen                           accept; ``conn`` from the predecessor may already have come
    accept* elsewhere*               who takes new connections; which models are whose
    rekey* committed* flush* recover* adopt_book* throttle*    in any order, any number
    drain -> conn* window* drained   every connection passed on, every record folded; the worker then exits by itself
    stop, EOF or SIGTERM             finish what is in flight, send what can be sent, exit

This module loads only msgspec: the supervisor imports it.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="t"):
    """Base of all messages. Fields with units carry them in their names."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a generation.

    Attributes:
        name, version, digest, variant: as the manifest and the outbox call them.
        path: folder of the bundle, complete and verified.
        arm, rollout, stage: the rest of the window key.
        ring: path of the recorder's ring file; made by the worker, must not exist.
    """

    name: str
    version: str
    digest: str
    variant: str
    path: str
    ring: str
    arm: str = "none"
    rollout: str = ""
    stage: int = 0


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Who may ask, and how often.

    Attributes:
        clients: path of the clients' file; empty: everyone who can connect may ask.
        rate: requests per second of each client that has no rate of its own; 0: no limit.
        burst: at once after a pause; 0: a second's worth.
        distinct: whether different requests are counted.
        shared: path of the file in which all workers of the device count against these limits; empty: each on its own.
    """

    clients: str = ""
    rate: float = 0.0
    burst: int = 0
    distinct: bool = False
    shared: str = ""


# --- supervisor -> worker -------------------------------------------------------------------------------------------


class SamplingRules(msgspec.Struct, frozen=True, kw_only=True):
    """Which answered rows are kept whole.

    Attributes:
        rate: share by hash; 0: no row is kept, for whatever reason.
        per_hour: most of one reason in an hour.
        personal: what becomes of features marked ``pii``: ``drop``, or ``hash`` with ``key``.
        kept: how many other workers kept in this hour already, by model and reason, ``<model> <why>``.
    """

    rate: float = 0.0
    per_hour: int = 60
    personal: str = "drop"
    key: bytes = b""
    kept: dict[str, int] = {}


class Start(Message, frozen=True, kw_only=True, tag="start"):
    """Load and prove these models.

    Attributes:
        window_s: span of a window in normal use.
        fold_interval_s: when above 0, windows are cut this often instead (tests, demo).
        max_inflight: requests accepted at once; more are shed with 503.
        max_wait_s: so are those that should wait longer.
        inline_below_us: requests expected to take less are answered on the event loop's thread.
        boot_id: 32 hex digits of the kernel's boot.
        label_age_s: labels that come later than this are late; 0: no labels are taken.
        label_predictions: remembered per window key.
        label_books: former keys that are kept for labels.
        acceleration: what models should run on, fields of ``skerry_runtime.acceleration.Acceleration``.
        throttle: inferences per second of all clients together; 0: no bound.
        refused: see ``Refuse``.
        otlp_endpoint: where spans go; empty: nowhere. trace_share: of requests without a ``traceparent``. device: whose spans.

    With several models it carries the descriptor of the note (``serving.notes``) that says which is in work.
    """

    generation: int
    models: tuple[Served, ...]
    window_s: float = 300.0
    fold_interval_s: float = 0.0
    health_interval_s: float = 5.0
    max_inflight: int = 64
    max_wait_s: float = 5.0
    inline_below_us: float = 1000.0
    boot_id: str = ""
    label_age_s: float = 86400.0
    label_predictions: int = 65536
    label_books: int = 16
    access: Access = Access()
    throttle: float = 0.0
    acceleration: dict[str, Any] = {}
    otlp_endpoint: str = ""
    trace_share: float = 0.0
    device: str = ""
    sampling: SamplingRules = SamplingRules()
    refused: tuple[str, ...] = ()


class StartShadow(Message, frozen=True, kw_only=True, tag="start_shadow"):
    """Load and prove one bundle that answers nobody, and compare what it says with what is answered. Answer: ``ready`` or ``failed``.

    Attributes:
        candidate: the bundle; ``ring`` only names the positions of its windows, there is no file.
        cpu: share of one core that it may take; max_c: degrees Celsius above which it pauses, 0 for any.
        acceleration: as in ``start``; sampling: which pairs that disagree are kept whole.
    """

    candidate: Served
    cpu: float
    max_c: float
    fold_interval_s: float
    acceleration: dict[str, Any] = {}
    sampling: SamplingRules = SamplingRules()
    boot_id: str = ""
    health_interval_s: float = 5.0


class Feed(Message, frozen=True, kw_only=True, tag="feed"):
    """The descriptor leads to a shadow, or from what answers. A worker shows this share of ``model``'s requests there.

    Without a descriptor the process may open no more: there is no shadow then.
    """

    model: str
    share: float = 0.0


class Warm(Message, frozen=True, kw_only=True, tag="warm"):
    """Before ``start``: load these runtimes, and wait."""

    runtimes: tuple[str, ...]


class Cold(msgspec.Struct, frozen=True, kw_only=True):
    """How often a model's worker was started for a request, what that took the last time and at most; since the agent started."""

    starts: int = 0
    last_ms: int = 0
    max_ms: int = 0


class Listen(Message, frozen=True, kw_only=True, tag="listen"):
    """Begin to accept on the listening socket.

    Attributes:
        books: label books of others; each will come by ``adopt_book`` once nobody writes it any more.
        accept: take new connections, not only those that are passed on.
        cold_ms: how long requests have waited for this worker to start; 0 when none has. cold: for the statistics.
    """

    books: tuple[str, ...] = ()
    accept: bool = True
    cold_ms: int = 0
    cold: Cold = Cold()


class Accept(Message, frozen=True, kw_only=True, tag="accept"):
    """Take new connections from now on, or no more. What waits for a connection is another worker's then."""

    on: bool


class Elsewhere(Message, frozen=True, kw_only=True, tag="elsewhere"):
    """Models that other workers serve, and their versions. A connection with a request for one of them is given away by ``conn``."""

    models: dict[str, str]


class Refuse(Message, frozen=True, kw_only=True, tag="refuse"):
    """Answer no more for these models, as if they were not served; the others go on. A worker that takes its place comes when one can."""

    models: tuple[str, ...]


class Drain(Message, frozen=True, kw_only=True, tag="drain"):
    """Stop accepting, pass every connection on, finish busy ones within ``deadline_s``, fold, say ``drained``, exit."""

    deadline_s: float = 10.0


class Conn(Message, frozen=True, kw_only=True, tag="conn"):
    """A client's connection, as the datagram's descriptor; both directions.

    Attributes:
        head: bytes already read from it and not yet answered.
        model: to the supervisor: of another worker, for which the request is. To a worker: that model; the worker answers the
            request itself, whatever it knows of it. Empty for a connection of a worker that leaves.
        waited: to a worker: ``cold`` when the request had its model loaded, ``waiting`` when it waited for that; empty when neither.
        retry_s: to a worker: turn the request away, the client may come again after so many seconds. 0: answer it.
        own: no client's: the worker that gave it away asks on it itself (``worker.neighbours``).
        id: to a worker: answered by ``took``; 0 for no answer.

    It arrives without a descriptor when the receiver may open no more: the connection is lost then.
    """

    head: bytes = b""
    model: str = ""
    waited: str = ""
    retry_s: int = 0
    own: bool = False
    id: int = 0


class Rekey(Message, frozen=True, kw_only=True, tag="rekey"):
    """Cut the model's window now; count what follows under the new key, in the new ring. Answer: ``rekeyed``."""

    model: str
    ring: str
    arm: str = "none"
    rollout: str = ""
    stage: int = 0


class Committed(Message, frozen=True, kw_only=True, tag="committed"):
    """The store holds every window of ``ring``, a ring or a label book, below position ``upto``."""

    ring: str
    upto: int


class Recover(Message, frozen=True, kw_only=True, tag="recover"):
    """Fold what a dead worker left in ``ring`` from position ``start`` on. Answer: ``window`` if any, then ``recovered``."""

    ring: str
    start: int = msgspec.field(name="from")


class AdoptBook(Message, frozen=True, kw_only=True, tag="adopt_book"):
    """Take over a label book that nobody writes any more; the store holds it up to ``start``. In the end: ``book_closed``.

    The ring beside it, if there still is one, was given by ``recover`` before.
    """

    book: str
    start: int = msgspec.field(name="from")


class Flush(Message, frozen=True, kw_only=True, tag="flush"):
    """Cut all windows now. Answer: their ``window`` messages, then ``flushed``."""

    id: int


class Throttle(Message, frozen=True, kw_only=True, tag="throttle"):
    """Let so many inferences per second through, of all clients together; 0: no bound."""

    rate: float = 0.0


class Sample(Message, frozen=True, kw_only=True, tag="sample_by"):
    """Keep rows whole by these rules from now on."""

    rules: SamplingRules


class Stop(Message, frozen=True, kw_only=True, tag="stop"):
    """Finish what is in flight, for so long, fold, exit. Connections are closed. Without ``finish_s`` as long as the worker thinks fit."""

    finish_s: float = 0.0


# --- worker -> supervisor -------------------------------------------------------------------------------------------


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What the golden cases gave on this device.

    Attributes:
        max_abs_diff: greatest absolute difference of a number in any case.
        recall: per class label, over the labelled cases.
    """

    cases: int
    passed: int
    max_abs_diff: float = 0.0
    recall: dict[str, float] = {}


class Proved(msgspec.Struct, frozen=True, kw_only=True):
    """One model is loaded and proved.

    Attributes:
        infer_us: median time of one golden case, microseconds.
        runs_on: execution providers or delegates, the CPU last; fallback: why not on what was wished for, empty when it is.
    """

    name: str
    proof: Proof
    load_ms: float
    infer_us: float = 0.0
    runs_on: tuple[str, ...] = ("cpu",)
    fallback: str = ""


class Loading(Message, frozen=True, kw_only=True, tag="loading"):
    """Begins to load a model: what ends the worker from here on is that one's doing."""

    model: str


class Ready(Message, frozen=True, kw_only=True, tag="ready"):
    """All models of the generation are loaded and proved. ``base_mb``, ``own_mb``: its own memory before the first, and now."""

    pid: int
    models: tuple[Proved, ...]
    base_mb: float = 0.0
    own_mb: float = 0.0


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """The generation cannot serve; the worker exits. ``code`` is of the update vocabulary."""

    model: str
    code: str
    detail: str


class WindowCut(Message, frozen=True, kw_only=True, tag="window"):
    """The window of positions ``[start, upto)`` of a ring or a label book; each range is sent once.

    Attributes:
        body: ``wire.encode`` of the Window.
        inferences: answered requests in it, ``ok`` of its counts.
    """

    ring: str
    start: int = msgspec.field(name="from")
    upto: int
    body: bytes
    inferences: int = 0


class Sampled(Message, frozen=True, kw_only=True, tag="sample"):
    """A row that was kept whole: ``wire.encode`` of a Sample, without personal data."""

    body: bytes


class Rekeyed(Message, frozen=True, kw_only=True, tag="rekeyed"):
    """The old ring of ``model`` will get no more records; all its windows were sent."""

    model: str
    ring: str
    upto: int


class BookClosed(Message, frozen=True, kw_only=True, tag="book_closed"):
    """No label can come for this book any more; all its windows were sent. ``damage``: why it could not be read."""

    book: str
    damage: str = ""


class Recovered(Message, frozen=True, kw_only=True, tag="recovered"):
    """A dead worker's ring is folded up to ``upto``; once that is committed the file may go.

    Attributes:
        lost: records that were overwritten before they were committed.
        damage: why the ring could not be read, or not all of it; empty when it could.
        inferences: most requests that the damage can have cost.
    """

    ring: str
    upto: int
    lost: int = 0
    damage: str = ""
    inferences: int = 0


LATENCY_MS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0)
"""Bounds between which answered requests are counted for ``/metrics``."""


class ModelHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since ``listen``. ``p95_ms`` of answered requests is None before the first.

    Attributes:
        latency: answered requests that took at most each of ``LATENCY_MS``; empty before the first. latency_s: of all, together.
    """

    ok: int = 0
    invalid: int = 0
    failed: int = 0
    shed: int = 0
    p95_ms: float | None = None
    since_s: float = 0.0
    latency: tuple[int, ...] = ()
    latency_s: float = 0.0


class Health(Message, frozen=True, kw_only=True, tag="health"):
    """Sent every ``health_interval_s`` and once before ``drained``.

    Attributes:
        busy_s: how long the inference in the inference thread has taken so far; 0 when there is none.
        expected_s: what it should take.
        at_s, own_mb, cpu_s, work: see ``core.liveness.Use``.
        held_mb: of ``own_mb``, what clients' requests take.
        spans_sent, spans_dropped: requests whose spans the collector took, and did not get.
        clients: of each that asked since the last report, ``histogram.Distinct`` registers of its different requests.
    """

    models: dict[str, ModelHealth]
    inflight: int
    rss_mb: float
    busy_s: float = 0.0
    expected_s: float = 0.0
    at_s: float = 0.0
    own_mb: float = 0.0
    cpu_s: float = 0.0
    work: int = 0
    held_mb: float = 0.0
    spans_sent: int = 0
    spans_dropped: int = 0
    clients: dict[str, bytes] = {}


class Cut(Message, frozen=True, kw_only=True, tag="cut"):
    """Connections of the predecessor that came without their descriptors: this process may open no more. Their clients are cut off."""

    connections: int


class Took(Message, frozen=True, kw_only=True, tag="took"):
    """The connection ``id`` is this worker's now. Until it says so the supervisor holds it too, for the next one if this one dies."""

    id: int


class Drained(Message, frozen=True, kw_only=True, tag="drained"):
    """No connection and no uncut record is left. ``unpassed``: connections that had to be closed at the deadline."""

    unpassed: int = 0


class Flushed(Message, frozen=True, kw_only=True, tag="flushed"):
    """All windows that existed when ``flush`` came have been sent."""

    id: int


class Logged(Message, frozen=True, kw_only=True, tag="logged"):
    """A line of the worker's log, for the agent's ring.

    Attributes:
        at_s: wall clock, seconds since 1970; level: of ``logging``.
        logger, text: who said what; ``trace``: where an exception came from, without its words.
        unsaid: lines before this one that were too many.
    """

    at_s: float
    level: int
    logger: str
    text: str
    trace: str = ""
    unsaid: int = 0


ToWorker = (
    Warm
    | Throttle
    | Sample
    | Start
    | StartShadow
    | Feed
    | Listen
    | Accept
    | Elsewhere
    | Refuse
    | Drain
    | Conn
    | Rekey
    | Committed
    | Recover
    | AdoptBook
    | Flush
    | Stop
)
ToSupervisor = (
    Loading
    | Ready
    | Failed
    | WindowCut
    | Sampled
    | Rekeyed
    | Recovered
    | BookClosed
    | Health
    | Conn
    | Cut
    | Took
    | Drained
    | Flushed
    | Logged
)
