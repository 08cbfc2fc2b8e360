"""What waits for an agent that is away: kept apart up to a number, then merged exactly; what was sent stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from skerry_agent import workerwire as ww
from skerry_agent.sdk.ledger import MOST_WAITING, File, Ledger
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


def filled(sizes: list[int], *, away: bool) -> tuple[Ledger, File]:
    found, file = ledger()
    at = 0
    for n in sizes:
        found.take(cut(at, n))
        found.sort_in(away=away)
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
def test_windows_of_an_agent_that_is_away_merge_and_lose_nothing(sizes: list[int]) -> None:
    _, file = filled(sizes, away=True)
    rows = covered(file)
    assert len(rows) <= MOST_WAITING
    assert sum(ok for *_, ok in rows) == sum(inferences for *_, inferences, _ in rows) == sum(sizes)
    assert [start for start, *_ in rows] == [0, *(upto for _, upto, *_ in rows[:-1])]


def test_windows_that_were_sent_or_would_be_too_long_do_not_merge() -> None:
    _, long = filled([3 << 20] * (MOST_WAITING + 5), away=True)
    assert len(long.waiting) == MOST_WAITING + 5
    found, file = filled([1] * MOST_WAITING, away=True)
    file.waiting[0].sent = True
    found.take(cut(MOST_WAITING, 1))
    found.sort_in(away=True)
    assert len(file.waiting) == MOST_WAITING + 1


def test_after_a_reconnection_what_the_store_has_is_dropped_and_the_rest_is_sent_again() -> None:
    _, file = filled([5, 5, 5], away=False)
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
    found.sort_in(away=False)
    found.forget(PATH)
    assert found.empty
    assert file.descriptor == -1
