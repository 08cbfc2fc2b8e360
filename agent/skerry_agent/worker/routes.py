"""The paths of the Open Inference Protocol v2 (REST) and of Skerry's own, and what each answers.

Every error is ``{"error": "..."}``. A model of the generation is always loaded and proved, so ready means known.
"""

from __future__ import annotations

import asyncio
import os
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import monotonic_ns, time

import msgspec
from skerry_contract import __version__
from skerry_contract import manifest as m

from skerry_agent.worker import access as a
from skerry_agent.worker import http1, intake, oip
from skerry_agent.worker import ring as r
from skerry_agent.worker.coding import Packing
from skerry_agent.worker.explaining import Explaining
from skerry_agent.worker.feedback import Feedback
from skerry_agent.worker.inference import Done, InferenceService
from skerry_agent.worker.intake import LEAST_BODY
from skerry_agent.worker.model import Model
from skerry_agent.worker.spans import Spans
from skerry_agent.worker.splitting import Splitting
from skerry_agent.worker.statistics import statistics_of

EXTENSIONS = ("binary_tensor_data", "model_repository", "sequence", "statistics")
REFUSALS_APART_S = 0.1
"""On one connection, at least."""
LEAST_HELD = 32 << 20
_CACHED_PATHS = 256
_EXPLAIN = b"/skerry/v1/explain"
_THREE, _FIVE = b"35"
_Json = dict[str, object]


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be asked of the repository's index."""

    ready: bool = False


class Routes:
    """Dispatches requests to the models of one generation.

    Args:
        gate: what every request must pass first; spans: what is traced; None for nothing.

    Attributes:
        name_of: who asks, where that is counted or a model has streams; None where neither is.
        most_held: bytes of requests not yet answered that are worth keeping: two of the largest that a model takes.
        elsewhere: models that other workers serve, and their versions, for the index.
    """

    def __init__(
        self,
        models: dict[str, Model],
        service: InferenceService,
        feedback: Feedback | Splitting,
        explaining: Explaining,
        gate: a.Gate | None = None,
        spans: Spans | None = None,
        generation: int = 0,
    ) -> None:
        self._explaining = explaining
        self.gate = gate
        self._loop = asyncio.get_running_loop()
        self._models = dict(models)
        self._infer = service.answer if spans is None else spans.watching(service.answer)
        self._feedback = feedback
        self._service = service
        self._packing = Packing()
        self._most_body = max((model.takes.body_bytes for model in models.values()), default=LEAST_BODY)
        self._infer_paths: dict[bytes, Model] = {}
        self.most_held = max(LEAST_HELD, 2 * self._most_body)
        self.elsewhere: dict[str, str] = {}
        self.name_of: Callable[[http1.Head, a.Asker], str] | None = None
        self._worker = {"pid": os.getpid(), "generation": generation, "since": int(time() * 1e3)}

    def refuse(self, names: Iterable[str]) -> None:
        """These models are served no more."""
        for name in names:
            self._models.pop(name, None)
        self._infer_paths = {path: model for path, model in self._infer_paths.items() if model.name in self._models}

    def handle(self, request: http1.Request, done: Done, asker: a.Asker) -> bytes | None:
        """Returns the reply's bytes, or None and calls ``done`` with them later, in the loop."""
        if self.gate is not None:
            refused = self._refused(self.gate, request.head, asker)
            if refused is not None:
                return self.space(refused, done, asker)
        if self.name_of is not None and request.head.path.endswith(b"/infer"):
            # Behind the gate, which knows a head by its identity.
            head = replace(request.head, client=self.name_of(request.head, asker))
            request = replace(request, head=head)
        reply = self._packed(request, done, asker) if request.head.accepts else self._answer(request, done, asker)
        if reply is not None and reply[9] == _FIVE and reply[11] == _THREE:
            return self.space(reply, done, asker)
        return reply

    def begin(self, head: http1.Head, asker: a.Asker) -> bytes | int:
        """The refusal that the header block has earned, else the most bytes that the body may have; for one that is not whole yet."""
        if self.gate is not None:
            refused = self._refused(self.gate, head, asker, take=False)
            if refused is not None:
                return refused
        model = self._infer_paths.get(head.path) if head.method == "POST" else None
        most, whose = LEAST_BODY, head.path
        if model is None:
            what, name = _meaning(head)
            model = self._models.get(name) if what == a.INFER else None
        if model is not None:
            shed = self._service.foresee(model, head)
            if shed is not None:
                return shed
            most, whose = model.takes.body_bytes, model.name.encode()
        elif head.path == _EXPLAIN:
            most = self._most_body
        if head.length > most:
            text = f"body: at most {most} bytes for {_shown(whose)}, got {head.length}"
            return http1.reply(413, oip.error_body(text), close=not head.keep_alive)
        return most

    def space(self, refusal: bytes, done: Done, asker: a.Asker) -> bytes | None:
        """Holds a refusal back when its connection was refused a moment ago: who comes again at once costs less than who is served."""
        now_s = self._loop.time()
        due_s = asker.refused_s + REFUSALS_APART_S
        if now_s >= due_s:
            asker.refused_s = now_s
            return refusal
        asker.refused_s = due_s
        self._loop.call_later(due_s - now_s, done, refusal)
        return None

    def _packed(self, request: http1.Request, done: Done, asker: a.Asker) -> bytes | None:
        coding = request.head.accepts
        reply = self._answer(request, self._packing.later(coding, done), asker)
        return reply if reply is None else self._packing.now(reply, coding, done)

    def _refused(self, gate: a.Gate, head: http1.Head, asker: a.Asker, *, take: bool = True) -> bytes | None:
        start = monotonic_ns()
        model = self._infer_paths.get(head.path) if head.method == "POST" else None
        what, name = (a.INFER, model.name) if model is not None else _meaning(head)
        refusal = gate.judge(head, asker, what, name, take=take)
        if refusal is None:
            return None
        model = model or self._models.get(name)
        if model is not None and what == a.INFER:
            now = monotonic_ns()
            model.recorder.other(r.SHED, now - start, now, r.RETRY if head.attempt > 1 else 0, refusal.kinds)
        reply = http1.reply(
            refusal.status, oip.error_body(refusal.message), close=not head.keep_alive, extra=refusal.extra
        )
        return _without_body(reply) if head.method == "HEAD" else reply

    def _answer(self, request: http1.Request, done: Done, asker: a.Asker) -> bytes | None:
        head = request.head
        if head.method == "POST":
            model = self._infer_paths.get(head.path)
            if model is not None and head.has_length:
                return self._infer(model, request, done)
        try:
            return self._dispatch(request, done, asker)
        except _Status as error:
            extra = b"Allow: %b\r\n" % error.allow if error.allow else b""
            reply = http1.reply(error.status, oip.error_body(error.message), close=not head.keep_alive, extra=extra)
            return _without_body(reply) if head.method == "HEAD" else reply

    def _dispatch(self, request: http1.Request, done: Done, asker: a.Asker) -> bytes | None:
        head = request.head
        parts = _split(head.path)
        if parts == ["skerry", "v1", "feedback"]:
            _require_body(head)
            return self._feedback.answer(intake.plain(request, LEAST_BODY), done, self._allowed(head, asker))
        if parts == ["skerry", "v1", "explain"]:
            _require_body(head)
            return self._explaining.answer(intake.plain(request, self._most_body), done, self._allowed(head, asker))
        if parts[:1] != ["v2"]:
            raise _Status(404, f"no such path: {_shown(head.path)}")
        match parts[1:]:
            case []:
                return _get(head, lambda: {"name": "skerry", "version": __version__, "extensions": EXTENSIONS})
            case ["health", "live" | "ready" as which]:
                return _get(head, lambda: {which: True})
            case ["repository", *rest]:
                return self._repository(request, asker, rest)
            case ["models", "stats"] if "stats" not in self._models:
                return _get(head, lambda: self._statistics(head, asker))
            case ["models", name, *rest] if rest[:1] != ["versions"]:
                return self._model(request, done, name, None, rest)
            case ["models", name, "versions", version, *rest]:
                return self._model(request, done, name, version, rest)
        raise _Status(404, f"no such path: {_shown(head.path)}")

    def _allowed(self, head: http1.Head, asker: a.Asker) -> tuple[str, ...]:
        """The models that a client is bound to; empty for all."""
        return self.gate.models_of(head, asker) if self.gate is not None else ()

    def _known_to(self, head: http1.Head, asker: a.Asker) -> list[Model]:
        allowed = self._allowed(head, asker)
        return [model for model in self._models.values() if not allowed or model.name in allowed]

    def _model(
        self, request: http1.Request, done: Done, name: str, version: str | None, rest: list[str]
    ) -> bytes | None:
        head = request.head
        model = self._models.get(name)
        if model is None:
            raise _Status(404, f"no such model: {_shown(name)}")
        if version is not None and version != model.version:
            raise _Status(404, f"{name}: no such version: {_shown(version)}, it is {model.version}")
        match rest:
            case []:
                return _get(head, lambda: _metadata(model))
            case ["ready"]:
                return _get(head, lambda: {"name": name, "ready": True})
            case ["stats"]:
                return _get(head, lambda: {**_statistics([model]), "worker": self._worker})
            case ["infer"]:
                _require_body(head)
                if len(self._infer_paths) < _CACHED_PATHS:
                    self._infer_paths[head.path] = model
                return self._infer(model, request, done)
        raise _Status(404, f"no such path: {_shown(head.path)}")

    def _statistics(self, head: http1.Head, asker: a.Asker) -> _Json:
        allowed = self._allowed(head, asker)
        elsewhere = sorted(name for name in self.elsewhere if not allowed or name in allowed)
        return {**_statistics(self._known_to(head, asker)), "worker": self._worker, "elsewhere": elsewhere}

    def _repository(self, request: http1.Request, asker: a.Asker, rest: list[str]) -> bytes:
        head = request.head
        match rest:
            case ["index"]:
                if head.method != "POST":
                    raise _Status(405, f"{head.method}: wanted POST", allow=b"POST")
                try:
                    msgspec.json.decode(intake.plain(request, LEAST_BODY).body or b"{}", type=_Index)
                except (msgspec.DecodeError, RecursionError) as error:
                    raise _Status(400, f"index: {error}") from None
                # What is not ready is not in a generation: with "ready" or without, these are all.
                versions = {model.name: model.version for model in self._known_to(head, asker)}
                allowed = self._allowed(head, asker)
                versions |= {name: at for name, at in self.elsewhere.items() if not allowed or name in allowed}
                found = [
                    {"name": name, "version": version, "state": "READY", "reason": ""}
                    for name, version in sorted(versions.items())
                ]
                return http1.reply(200, msgspec.json.encode(found), close=not head.keep_alive)
            case ["models", name, "load" | "unload" as act]:
                if head.method != "POST":
                    raise _Status(405, f"{head.method}: wanted POST", allow=b"POST")
                raise _Status(
                    400, f"{_shown(name)}: {act}: not done here, rollouts of the fleet decide what this device serves"
                )
        raise _Status(404, f"no such path: {_shown(head.path)}")


def _meaning(head: http1.Head) -> tuple[int, str]:
    """What a request wants, as ``access`` has it, and the model that it is about."""
    match _split(head.path):
        case ["v2", "health", *_]:
            return a.OPEN, ""
        case ["skerry", "v1", "feedback"]:
            return a.LABEL, ""
        case ["v2", "models", "stats"]:
            return a.ASK, ""
        case ["v2", "models", name, *rest]:
            return (a.INFER if rest[-1:] == ["infer"] and head.method == "POST" else a.ASK), name
    return a.ASK, ""


class _Status(Exception):
    def __init__(self, status: int, message: str, *, allow: bytes = b"") -> None:
        self.status = status
        self.message = message
        self.allow = allow


def _require_body(head: http1.Head) -> None:
    if head.method != "POST":
        raise _Status(405, f"{head.method}: wanted POST", allow=b"POST")
    if not head.has_length:
        raise _Status(411, "wanted Content-Length or chunks")


def _get(head: http1.Head, answer: Callable[[], _Json]) -> bytes:
    if head.method not in ("GET", "HEAD"):
        raise _Status(405, f"{head.method}: wanted GET", allow=b"GET, HEAD")
    reply = http1.reply(200, msgspec.json.encode(answer()), close=not head.keep_alive)
    return _without_body(reply) if head.method == "HEAD" else reply


def _without_body(reply: bytes) -> bytes:
    return reply[: reply.index(b"\r\n\r\n") + 4]


def _metadata(model: Model) -> _Json:
    def shown(tensors: tuple[m.Tensor, ...]) -> list[_Json]:
        return [{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in tensors]

    return {
        "name": model.name,
        "versions": [model.version],
        "platform": model.platform,
        "inputs": shown(model.manifest.inputs),
        "outputs": shown(model.manifest.outputs),
    }


def _statistics(models: Iterable[Model]) -> _Json:
    return {
        "model_stats": [
            statistics_of(model.name, model.version, model.recorder.totals(), model.cold) for model in models
        ]
    }


def _split(path: bytes) -> list[str]:
    text = path.decode("utf-8", "replace").removesuffix("/")
    return [urllib.parse.unquote(part) for part in text.split("/")[1:]]


def _shown(text: str | bytes) -> str:
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return text if len(text) <= 80 else text[:77] + "..."
