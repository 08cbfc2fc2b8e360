"""``POST /skerry/v1/feedback``: late labels, found by the prediction they are about and counted under its key.

A prediction id names a book (by its token) and a ring position, so nothing has to be looked up; a client's own request id
is looked up by its digest, in the books from the newest to the oldest, each of which has a sorted index of them. Books of former keys and of workers that are gone
are kept while labels may come for them; ``Start.label_*`` bounds age, size and number.

Indexes are made when the first label by a client's id comes, in slices between other work; that label waits for them. While a
predecessor is still leaving, its books are its own: a label that may belong to one of them waits until the
supervisor hands it over, and so does one for which there is no room before older ones are committed. What waits too long
is answered with 503 and was not counted. Every other label is in its book before the reply is sent.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import msgspec
import numpy as np

from skerry_agent import workerwire as ww
from skerry_agent.worker import book as b
from skerry_agent.worker import http1, mapped, oip
from skerry_agent.worker.recorder import Recorder

log = logging.getLogger(__name__)

MOST_LABELS = 1000
"""In one request: 10 ms of the event loop."""
MOST_SCANNED = 8192
"""Predictions that are looked through one by one for a client's id: 0.1 ms for one id, 0.5 ms for a thousand."""
WAIT_S = 15.0
"""Longer than a predecessor may take to leave."""
EXPECT_S = 60.0
"""A book that nobody handed over by then does not come any more."""
LOCKED_S = 0.1
"""Between two looks at a book that somebody still writes."""
RETRY_LATER = b"Retry-After: 1\r\n"
_PREDICTION = re.compile(r"([a-z0-9][a-z0-9-]{0,62})-([0-9a-f]{10})-([0-9a-f]{1,16})")

Done = Callable[[bytes], None]


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds: labels are late after ``max_age_s``; at most ``books`` of former keys are kept."""

    max_age_s: float
    books: int


class Timer(Protocol):
    """What is needed of the event loop."""

    def call_later(self, delay: float, callback: Callable[..., object], *args: object) -> object:
        """See asyncio."""


class Label(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One label as it came.

    Attributes:
        id: of the prediction, or the id that the client gave its request.
        label: a class by name or index.
        row: of a request with several rows.
    """

    id: str
    label: str | int
    model: str = ""
    row: int | None = None


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    feedback: list[Label]


class _Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    outcome: str
    row: int | None = None
    error: str = ""


class _Answer(msgspec.Struct, frozen=True):
    feedback: list[_Outcome]


class _MustWait(Exception):
    pass


class _Waiting(msgspec.Struct, eq=False):
    labels: list[Label]
    close: bool
    done: Done
    models: tuple[str, ...] = ()


_decoder = msgspec.json.Decoder(_Request)


def digest_of(ident: str) -> int:
    """The digest under which a client's own id is kept, never 0."""
    return int.from_bytes(hashlib.blake2b(ident.encode(), digest_size=8).digest(), "little") or 1


def models_of(body: bytes) -> set[str]:
    """The models that the labels of a request are about, as far as they say so; none when it cannot be read."""
    return {model_of(label) for label in labels_of(body)}


def labels_of(body: bytes) -> list[Label]:
    """The labels of a request; none when it cannot be read."""
    try:
        return _decoder.decode(body).feedback
    except (msgspec.DecodeError, RecursionError):
        return []


def model_of(label: Label) -> str:
    """The model that a label is about, as far as it says so."""
    parts = _PREDICTION.fullmatch(label.id)
    return label.model or (parts[1] if parts else "")


class Feedback:
    """Takes the labels of one worker. Not thread-safe: every call comes from the event loop's thread.

    Args:
        recorders: by model; their books are the present keys'.
        send: takes ``WindowCut`` and ``BookClosed`` messages to the supervisor.
        on_matched: hears of each first label of a prediction: book, position, true class, predicted class.

    Attributes:
        elsewhere: models that other workers serve. Their labels go there (``passing``, ``splitting``).
    """

    def __init__(
        self,
        recorders: Mapping[str, Recorder],
        rules: Rules,
        *,
        boot_id: str,
        send: Callable[[ww.Message], None],
        loop: Timer,
        on_matched: Callable[[b.Book, int, int, int], None] | None = None,
    ) -> None:
        self._on_matched = on_matched
        self._recorders = recorders
        self._rules = rules
        self._boot_id = boot_id
        self._send = send
        self._loop = loop
        self._kept: dict[str, b.Book] = {}
        self._awaited: dict[str, str] = {}
        self._waiting: list[_Waiting] = []
        self._slices: Iterator[None] | None = None
        self._leaving = False
        self.elsewhere: frozenset[str] = frozenset()

    # --- requests ---------------------------------------------------------------------------------------------------

    def answer(self, request: http1.Request, done: Done, models: tuple[str, ...] = ()) -> bytes | None:
        """Answers one request: returns the reply's bytes, or None and calls ``done`` with them later, in the loop.

        Args:
            models: whose predictions this client may label; empty for all.
        """
        close = not request.head.keep_alive
        try:
            labels = _decoder.decode(request.body).feedback
        except (msgspec.DecodeError, RecursionError) as error:
            return http1.reply(400, oip.error_body(f"feedback: {error}"), close=close)
        if len(labels) > MOST_LABELS:
            return http1.reply(
                400, oip.error_body(f"feedback: wanted at most {MOST_LABELS} labels, got {len(labels)}"), close=close
            )
        try:
            return self._count(labels, close, models)
        except _MustWait:
            waiting = _Waiting(labels, close, done, models)
            self._waiting.append(waiting)
            self._loop.call_later(WAIT_S, self._give_up, waiting)
            return None

    def knows(self, ident: str) -> bool:
        """Whether a prediction id is of a book that is here."""
        parts = _PREDICTION.fullmatch(ident)
        return parts is not None and any(book.header.token == parts[2] for book in self._books())

    def take(self, ident: str, label: str | int, row: int | None) -> tuple[str, str] | None:
        """Counts one label: (outcome, error); None when it must wait until windows are committed."""
        try:
            (found,) = self._outcomes([Label(ident, label, "", row)])
        except _MustWait:
            return None
        return found.outcome, found.error

    def _count(self, labels: list[Label], close: bool, models: tuple[str, ...] = ()) -> bytes:
        return http1.reply(200, msgspec.json.encode(_Answer(self._outcomes(labels, models))), close=close)

    def _outcomes(self, labels: list[Label], models: tuple[str, ...] = ()) -> list[_Outcome]:
        found = self._locate(labels)
        for book in self._books():
            if book.room < len(labels):
                self._cut(book)
                raise _MustWait
        at_ns, now_s = time.monotonic_ns(), time.clock_gettime(time.CLOCK_BOOTTIME)
        outcomes = [
            self._foreign(label, where[0], models) or self._judge(label, *where, at_ns, now_s)
            for label, where in zip(labels, found, strict=True)
        ]
        for book in self._books():
            if book.uncut >= book.header.records // 2:
                self._cut(book)
        return outcomes

    def _locate(self, labels: list[Label]) -> list[tuple[b.Book | None, int]]:
        """Where each prediction should be. Raises ``_MustWait`` when it may be where nobody can look yet."""
        books = {book.header.token: book for book in self._books()}
        found: list[tuple[b.Book | None, int]] = []
        foreign: dict[int, list[int]] = {}
        for i, label in enumerate(labels):
            parts = _PREDICTION.fullmatch(label.id)
            token = parts[2] if parts else ""
            if token in self._awaited:
                raise _MustWait
            if parts and token in books:
                found.append((books[token], int(parts[3], 16)))
            else:
                found.append((None, 0))
                foreign.setdefault(digest_of(label.id), []).append(i)
        self._read_up(found, foreign)
        if foreign:
            self._have_indexes()
            self._look_up(labels, found, foreign)
        return found

    def _look_up(
        self, labels: list[Label], found: list[tuple[b.Book | None, int]], foreign: dict[int, list[int]]
    ) -> None:
        """Finds clients' own ids: ``foreign`` has each digest's labels."""
        wanted = np.array(sorted(foreign), np.uint64)
        for book in reversed(list(self._books())):
            positions = book.positions_of(wanted)
            for ident, position in positions.items():
                fits = [i for i in foreign[ident] if labels[i].model in ("", book.header.key.model)]
                for i in fits:
                    found[i] = (book, position)
                foreign[ident] = [i for i in foreign[ident] if i not in fits]
                if not foreign[ident]:
                    del foreign[ident]
            if not foreign:
                return
            if positions:
                wanted = np.array(sorted(foreign), np.uint64)
        if self._awaited:
            raise _MustWait

    def _have_indexes(self) -> None:
        """Begins to index what is not. Raises ``_MustWait`` where looking through it would hold up everybody else."""
        closed = sum(book.unindexed for book in self._kept.values())
        if self._slices is None and max(closed, *(book.unindexed for book in self._books()), 0) > MOST_SCANNED:
            self._slices = self._index(list(self._books()))
            self._loop.call_later(0, self._index_further)
        # A book that is still written is looked through: it may grow faster than it is indexed.
        if closed > MOST_SCANNED:
            raise _MustWait

    def _index(self, books: list[b.Book]) -> Iterator[None]:
        for book in books:
            if book.unindexed:
                yield from book.index()
                yield

    def _index_further(self) -> None:
        if self._slices is None:
            return
        try:
            next(self._slices)
        except StopIteration:
            self._slices = None
            self._try_again()
            if self._leaving:
                self.leave()
        except Exception:
            # Without memory, say. The next label tries again; those that wait are told to.
            self._slices = None
            raise
        else:
            self._loop.call_later(0, self._index_further)

    def _read_up(self, found: list[tuple[b.Book | None, int]], foreign: dict[int, list[int]]) -> None:
        # What was answered a moment ago is in the ring and not yet in the book.
        for recorder in self._recorders.values():
            book = recorder.book
            if book is not None and (
                foreign or any(where is book and position >= book.filled for where, position in found)
            ):
                recorder.fold()

    def _foreign(self, label: Label, book: b.Book | None, models: tuple[str, ...]) -> _Outcome | None:
        """What a client is told that labels what it may not."""
        if not models:
            return None
        model = book.header.key.model if book is not None else model_of(label)
        if model in models or (not model and set(self._recorders) <= set(models)):
            return None
        return _invalid(label, f"this client may label {', '.join(models)} only")

    def _judge(self, label: Label, book: b.Book | None, position: int, at_ns: int, now_s: float) -> _Outcome:
        if book is None:
            return self._unknown(label, at_ns)
        if label.model not in ("", book.header.key.model):
            return _invalid(label, f"the prediction is of {book.header.key.model}")
        try:
            found = book.find(position, label.row, now_s)
        except b.NotFound as error:
            if error.wanted:
                return _invalid(label, f"wanted {error.wanted}")
            if not error.forgotten:
                return self._unknown(label, at_ns)
            book.record(b.LATE, at_ns=at_ns)
            return _outcome(label, b.LATE)
        truth = book.class_of(label.label)
        if truth is None:
            classes = ", ".join(book.header.output.labels[:20])
            return _invalid(label, f"wanted one of {classes}, or their index, got {str(label.label)[:80]!r}")
        outcome = _taken_for(found, truth, self._rules.max_age_s)
        book.record(
            outcome, at_ns=at_ns, position=found.position, truth=truth, predicted=found.predicted, lag_s=found.age_s
        )
        if outcome == b.MATCHED and self._on_matched is not None:
            self._on_matched(book, found.position, truth, found.predicted)
        return _outcome(label, outcome)

    def _unknown(self, label: Label, at_ns: int) -> _Outcome:
        model = model_of(label)
        if not model:
            if self.elsewhere or len(self._recorders) != 1:
                names = ", ".join(sorted({*self._recorders, *self.elsewhere}))
                return _invalid(label, f"wanted the model as well: one of {names}")
            (model,) = self._recorders
        recorder = self._recorders.get(model)
        # Of a model that is not served there is no key under which it could count.
        if recorder is not None and recorder.book is not None:
            recorder.book.record(b.UNKNOWN, at_ns=at_ns)
        return _outcome(label, b.UNKNOWN)

    # --- waiting ----------------------------------------------------------------------------------------------------

    def _try_again(self) -> None:
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            try:
                reply = self._count(one.labels, one.close, one.models)
            except _MustWait:
                self._waiting.append(one)
            else:
                one.done(reply)

    def _give_up(self, waiting: _Waiting) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            body = oip.error_body("labels cannot be counted now; nothing of this request was")
            waiting.done(http1.reply(503, body, close=waiting.close, extra=RETRY_LATER))

    def leave(self) -> None:
        """Answers what waits: this worker will not be given what it waits for, but for its own indexes."""
        if self._slices is not None:
            self._leaving = True
            return
        for waiting in list(self._waiting):
            self._give_up(waiting)

    # --- books ------------------------------------------------------------------------------------------------------

    def _books(self) -> Iterator[b.Book]:
        """Oldest first."""
        yield from self._kept.values()
        for recorder in self._recorders.values():
            if recorder.book is not None:
                yield recorder.book

    def expect(self, paths: tuple[str, ...]) -> None:
        """Notes books that will be handed over: labels for them wait."""
        for path in paths:
            try:
                token = mapped.read_header(path, b.MAGIC, b.VERSION, b.Header, boot_id=self._boot_id).token
            except mapped.Damaged:
                continue
            self._awaited[token] = path
        self._loop.call_later(EXPECT_S, self._expect_no_more)

    def _expect_no_more(self) -> None:
        if self._awaited:
            log.warning("label books did not come paths=%s", sorted(self._awaited.values()))
            self._awaited.clear()
            self._try_again()

    def adopt(self, path: str, start: int) -> None:
        """Takes over the book of a worker that is gone. ``start``: what the store holds of it."""
        try:
            book = b.Book.open(path, boot_id=self._boot_id)
        except mapped.Locked:
            # Never both: a label that its writer still takes would be counted twice.
            self._loop.call_later(LOCKED_S, self.adopt, path, start)
            return
        except Exception as error:
            self._not_adopted(path, error)
        else:
            try:
                book.resume(start)
                self._cut(book)
            except Exception as error:
                book.close()
                self._not_adopted(path, error)
            else:
                self.keep(book)
        self._awaited = {token: other for token, other in self._awaited.items() if other != path}
        self._try_again()

    def _not_adopted(self, path: str, error: Exception) -> None:
        # The file was mapped writable into a process that ran foreign native code: it may be anything.
        detail = str(error) if isinstance(error, mapped.Damaged) else f"{type(error).__name__}: {error}"
        log.warning("label book not taken over path=%s error=%s", path, detail)
        self._send(ww.BookClosed(book=path, damage=detail))

    def keep(self, book: b.Book) -> None:
        """Keeps the book of a key under which nothing is counted any more."""
        self._kept[book.header.token] = book
        self._kept = dict(sorted(self._kept.items(), key=lambda item: item[1].last_s))
        self._forget()

    def committed(self, path: str, upto: int) -> None:
        """Notes that the store holds ``path`` up to ``upto``."""
        for book in self._books():
            if book.path == path:
                book.commit(upto)
        if self._waiting:
            self._try_again()

    def close(self) -> None:
        """Gives all books up, for another to go on with."""
        for book in list(self._books()):
            book.close()

    def cut(self) -> None:
        """Sends the windows of all labels so far, and closes books that are too old."""
        for book in self._books():
            self._cut(book)
        self._forget()

    def _cut(self, book: b.Book) -> None:
        window = book.cut()
        if window is not None:
            self._send(window)

    def _forget(self) -> None:
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        # For as long again, so that a late label is called late and not unknown.
        oldest_s = now_s - 2 * self._rules.max_age_s
        gone = [token for token, book in self._kept.items() if book.last_s < oldest_s]
        gone += list(self._kept)[: max(0, len(self._kept) - self._rules.books)]
        for token in dict.fromkeys(gone):
            book = self._kept.pop(token)
            self._cut(book)
            book.close()
            self._send(ww.BookClosed(book=book.path))


def _taken_for(found: b.Found, truth: int, max_age_s: float) -> int:
    if found.truth != b.NONE:
        return b.DUPLICATE if found.truth == truth else b.CONFLICTING
    return b.LATE if found.age_s > max_age_s else b.MATCHED


def _outcome(label: Label, outcome: int) -> _Outcome:
    return _Outcome(label.id, b.OUTCOMES[outcome], label.row)


def _invalid(label: Label, error: str) -> _Outcome:
    return _Outcome(label.id, "invalid", label.row, error)
