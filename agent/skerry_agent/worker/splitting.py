"""Labels of several workers in one request: each part goes to its own, and the answers become one.

A request whose labels all concern one other worker goes there with its connection (``passing``); here is what is mixed. Each label
is answered in its place. Those of a worker that does not answer are ``unavailable``, were not counted, and can be sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from skerry_agent.worker import http1, oip
from skerry_agent.worker.feedback import MOST_LABELS, RETRY_LATER, Done, Feedback, Label, labels_of, model_of
from skerry_agent.worker.neighbours import Neighbours, Reply


class _Unavailable(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    outcome: str
    row: int | None = None
    error: str = ""


class _Said(msgspec.Struct):
    feedback: list[msgspec.Raw]


class Splitting:
    """See the module. Stands before the ``Feedback`` of its worker."""

    def __init__(self, feedback: Feedback, neighbours: Neighbours) -> None:
        self._feedback = feedback
        self._neighbours = neighbours

    def answer(self, request: http1.Request, done: Done, models: tuple[str, ...] = ()) -> bytes | None:
        """See ``Feedback.answer``."""
        elsewhere = self._neighbours.models
        labels = labels_of(request.body) if elsewhere else []
        parts: dict[str, list[int]] = {}
        for i, label in enumerate(labels):
            model = model_of(label)
            # What this client may not label is refused here.
            parts.setdefault(model if model in elsewhere and (not models or model in models) else "", []).append(i)
        if parts.keys() <= {""} or len(labels) > MOST_LABELS:
            return self._feedback.answer(request, done, models)
        _Split(labels, parts, request, done).ask(self._feedback, self._neighbours, models)
        return None


class _Split:
    """One request, in parts by model; the part without a model is this worker's."""

    def __init__(self, labels: list[Label], parts: dict[str, list[int]], request: http1.Request, done: Done) -> None:
        self._labels = labels
        self._parts = parts
        self._request = request
        self._done = done
        self._outcomes: list[Any] = [None] * len(labels)
        self._left = len(parts)
        self._counted = False

    def ask(self, feedback: Feedback, neighbours: Neighbours, models: tuple[str, ...]) -> None:
        for model, places in self._parts.items():
            body = msgspec.json.encode({"feedback": [self._labels[i] for i in places]})
            take = self._taker(model, places)
            if model:
                neighbours.ask(model, "/feedback", body, take)
                continue
            said = feedback.answer(replace(self._request, body=body), _reading(take), models)
            if said is not None:
                take(_read(said))

    def _taker(self, model: str, places: list[int]) -> Callable[[Reply | None], None]:
        def take(said: Reply | None) -> None:
            if said is not None and said.status == 200:
                self._counted = True
                found: list[Any] = list(msgspec.json.decode(said.body, type=_Said).feedback)
            else:
                why = said.error() if said is not None else "its worker does not answer"
                error = f"{model or 'these labels'}: {why}; not counted, to be sent again"
                found = [_Unavailable(self._labels[i].id, "unavailable", self._labels[i].row, error) for i in places]
            for i, outcome in zip(places, found, strict=True):
                self._outcomes[i] = outcome
            self._left -= 1
            if self._left == 0:
                self._reply()

        return take

    def _reply(self) -> None:
        close = not self._request.head.keep_alive
        if self._counted:
            self._done(http1.reply(200, msgspec.json.encode({"feedback": self._outcomes}), close=close))
        else:
            body = oip.error_body("labels cannot be counted now; nothing of this request was")
            self._done(http1.reply(503, body, close=close, extra=RETRY_LATER))


def _reading(take: Callable[[Reply | None], None]) -> Done:
    return lambda reply: take(_read(reply))


def _read(reply: bytes) -> Reply:
    head, _, body = reply.partition(b"\r\n\r\n")
    return Reply(int(head[9:12]), body)
