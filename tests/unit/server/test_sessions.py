"""Sessions of the page outlive the server, and their file opens none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from skerry_server.console import sessions
from skerry_server.console.sessions import LIFE_S, Sessions


def test_a_session_outlives_the_server_until_its_end(tmp_path: Path) -> None:
    cookie = Sessions(tmp_path / "sessions.json").begin("wall", 1000)
    again = Sessions(tmp_path / "sessions.json")
    assert again.holder(cookie, 1000 + LIFE_S * 1000 - 1) == "wall"
    assert again.holder(cookie, 1000 + LIFE_S * 1000) is None


def test_signing_out_outlives_the_server(tmp_path: Path) -> None:
    held = Sessions(tmp_path / "sessions.json")
    one, two = held.begin("wall", 0), held.begin("wall", 0)
    held.end(one)
    again = Sessions(tmp_path / "sessions.json")
    assert (again.holder(one, 1), again.holder(two, 1)) == (None, "wall")


def test_the_file_names_nothing_that_opens_a_session(tmp_path: Path) -> None:
    held = Sessions(tmp_path / "sessions.json")
    cookie = held.begin("wall", 0)
    text = (tmp_path / "sessions.json").read_text()
    assert cookie not in text
    (key,) = json.loads(text)
    assert held.holder(key, 1) is None


def test_the_oldest_goes_first_and_what_is_over_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MOST", 3)
    held = Sessions(tmp_path / "sessions.json")
    cookies = [held.begin("wall", n) for n in range(4)]
    assert [held.holder(cookie, 5) for cookie in cookies] == [None, "wall", "wall", "wall"]
    held.begin("late", LIFE_S * 1000 + 100)
    assert len(json.loads((tmp_path / "sessions.json").read_text())) == 1


def test_a_token_that_signs_in_again_and_again_signs_out_itself_alone(tmp_path: Path) -> None:
    held = Sessions(tmp_path / "sessions.json")
    wall = held.begin("wall", 0)
    mine = [held.begin("mine", 0) for _ in range(sessions.MOST_OF_ONE + 5)]
    assert [held.holder(cookie, 1) for cookie in mine] == [None] * 5 + ["mine"] * sessions.MOST_OF_ONE
    assert Sessions(tmp_path / "sessions.json").holder(wall, 1) == "wall"


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"a": ["wall", "x"]}', "\x00", '{"a": ["wall", null]}'])
def test_a_scribbled_file_holds_no_session_and_the_next_one_is_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sessions.json"
    path.write_text(text)
    cookie = Sessions(path).begin("wall", 0)
    assert Sessions(path).holder(cookie, 1) == "wall"
