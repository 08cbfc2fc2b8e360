"""What waits for an agent that is away, hangs or cannot store: kept apart up to a number, then merged exactly; what was sent stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from skerry_agent import workerwire as ww
from skerry_agent.sdk.ledger import MOST_SENT, MOST_WAITING, File, Ledger
from skerry_contract import window as w
from skerry_contract import wire

KEY = w.Key("gas", "ab" * 32, "v", "none", "", 0)
PATH = "/rings/app1-gas-0.ring"


def cut(start: int, n: int) -> ww.WindowCut:
    first, last = (w.Instant("00" * 16, at, at, True) for at in (start, start + n))
    body = wire.encode(w.Window(key=KEY, start=first, end=last, counts=w.Counts(ok=n, rows=n)))
    return ww.WindowCut(ring=PATH, start=start, upto=start + n, body=body, inferences=n)


def ledger() -> tuple[Ledger, File]:
    found = Ledger()
    file = File(ring=PATH, path=PATH, descriptor=os.open(os.devnull, os.O_RDONLY), key=KEY, version="1.0.0")
    found.files[PATH] = file
    return found, file


def filled(sizes: list[int]) -> tuple[Ledger, File]:
    found, file = ledger()
    at = 0
    for n in sizes:
        found.take(cut(at, n))
        found.sort_in()
        at += n
    return found, file


def covered(file: File) -> list[tuple[int, int, int, int]]:
    rows = []
    for one in file.waiting:
        assert isinstance(one.message, ww.WindowCut)
        rows.append(
            (
                one.message.start,
                one.message.upto,
                one.message.inferences,
                wire.decode_window(one.message.body).counts.ok,
            )
        )
    return rows


@given(st.lists(st.integers(1, 500), min_size=1, max_size=3 * MOST_WAITING))
def test_windows_that_the_agent_does_not_store_merge_and_lose_nothing(sizes: list[int]) -> None:
    _, file = filled(sizes)
    rows = covered(file)
    assert len(rows) <= MOST_WAITING
    assert sum(ok for *_, ok in rows) == sum(inferences for *_, inferences, _ in rows) == sum(sizes)
    assert [start for start, *_ in rows] == [0, *(upto for _, upto, *_ in rows[:-1])]


def test_windows_that_were_sent_or_would_be_too_long_do_not_merge() -> None:
    _, long = filled([3 << 20] * (MOST_WAITING + 5))
    assert len(long.waiting) == MOST_WAITING + 5
    found, file = filled([1] * MOST_WAITING)
    file.waiting[0].sent = True
    for i in range(5):
        found.take(cut(MOST_WAITING + i, 1))
        found.sort_in()
    assert len(file.waiting) == MOST_WAITING
    rows = covered(file)
    assert rows[0] == (0, 1, 1, 1), "what was sent stays as it was sent"
    assert rows[1] == (1, 7, 6, 6)


def test_only_some_windows_are_on_their_way_and_a_commit_makes_room_for_the_next() -> None:
    _, file = filled([1] * 40)
    sent = 0
    while file.room:
        file.waiting[sent].sent = True
        sent += 1
    assert sent == MOST_SENT
    file.committed(3)
    assert file.room
    few = filled([1] * 3)[1]
    for one in few.waiting:
        one.sent = True
    assert few.room


def test_after_a_reconnection_what_the_store_has_is_dropped_and_the_rest_is_sent_again() -> None:
    _, file = filled([5, 5, 5])
    for one in file.waiting:
        one.sent = True
    file.unsend(5)
    assert [(one.message.start, one.sent) for one in file.waiting if isinstance(one.message, ww.WindowCut)] == [
        (5, False),
        (10, False),
    ]
    file.committed(12)
    assert [row[:2] for row in covered(file)] == [(10, 15)]


def test_a_file_that_is_over_gives_its_lock_up(tmp_path: Path) -> None:
    found, file = ledger()
    assert found.empty
    found.take(ww.BookClosed(book=PATH))
    assert not found.empty
    found.sort_in()
    found.forget(PATH)
    assert found.empty
    assert file.descriptor == -1
