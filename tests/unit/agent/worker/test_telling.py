"""A worker's log lines on their way to the agent's ring: bounded, of our own loggers, without the words of exceptions."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator

import pytest
from skerry_agent import logs
from skerry_agent import workerwire as ww
from skerry_agent.logring import LogRing
from skerry_agent.worker import telling
from skerry_agent.workers import record_of


class Heard:
    """A handler on a loop that runs in a thread, and what it sent."""

    def __init__(self) -> None:
        self.said: list[ww.Logged] = []
        self.now_s = 0.0
        self.threads: set[int] = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.handler = telling.Telling(self.loop, self._take, now_s=lambda: self.now_s)

    def _take(self, message: ww.Message) -> None:
        assert isinstance(message, ww.Logged)
        self.threads.add(threading.get_ident())
        self.said.append(message)

    def all(self) -> list[ww.Logged]:
        done = threading.Event()
        self.loop.call_soon_threadsafe(done.set)
        assert done.wait(10)
        return self.said

    def close(self) -> None:
        self.handler.end()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def heard() -> Iterator[Heard]:
    found = Heard()
    yield found
    found.close()


def record(text: str, name: str = "skerry_agent.worker.x", **more: object) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "", 0, text, None, more.get("exc_info"))  # type: ignore[arg-type]


def test_a_flood_is_counted_and_what_comes_later_says_how_much_was_not_said(heard: Heard) -> None:
    for n in range(telling.BURST + 30):
        heard.handler.handle(record(f"line {n}"))
    assert [one.text for one in heard.all()] == [f"line {n}" for n in range(telling.BURST)]
    heard.now_s = 2.0
    heard.handler.handle(record("after"))
    assert (heard.all()[-1].text, heard.all()[-1].unsaid) == ("after", 30)
    assert heard.threads == {heard.thread.ident}, "sent in the loop's thread only"


def test_an_exception_goes_along_as_its_type_and_place_and_never_in_its_words(heard: Heard) -> None:
    try:
        raise ValueError("could not convert string to float: 'Alice Miller'")
    except ValueError as error:
        heard.handler.handle(record("request failed", exc_info=(type(error), error, error.__traceback__)))
    (said,) = heard.all()
    assert said.trace.startswith("ValueError at test_telling.py:")
    assert "Alice" not in repr(said)


def test_strangers_lines_stay_where_they_are_and_long_ones_are_cut(heard: Heard) -> None:
    heard.handler.handle(record("from elsewhere", name="asyncio"))
    heard.handler.handle(record("x" * 100_000, name="skerry_runtime.runner"))
    (said,) = heard.all()
    assert len(said.text) == telling.MOST_CHARS


def test_a_line_after_the_loop_is_closed_is_lost_and_nothing_else() -> None:
    gone = Heard()
    gone.close()
    gone.handler.handle(record("too late"))
    assert gone.said == []


def test_the_ring_takes_a_workers_line_redacted_with_a_percent_sign_as_it_is_and_by_the_level_of_the_log() -> None:
    ring = LogRing(None)
    root = logging.getLogger("skerry_agent")
    before = root.handlers[:], root.level, root.propagate
    try:
        logs.configure(as_json=False, level="info", ring=ring)
        said = ww.Logged(
            at_s=7.5, level=logging.ERROR, logger="skerry_agent.worker.x", text="100% token=abcdefgh", unsaid=3
        )
        logs.keep(record_of(said, 4711))
        logs.keep(record_of(ww.Logged(at_s=8, level=logging.DEBUG, logger="skerry_agent.worker.x", text="quiet"), 4711))
    finally:
        root.handlers[:], root.level, root.propagate = before
    (line,) = ring.tail(10_000).splitlines()
    assert json.loads(line) == {
        "at": 7.5, "level": "error", "logger": "worker.x", "message": "100% token=[hidden]",
        "fields": {"pid": "4711", "unsaid": "3"},
    }  # fmt: skip
