"""What devices wrote reaches the operator's terminal as text: nothing in it is obeyed."""

from __future__ import annotations

import os
import pty

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from skerry_cli import output

CLEARS = "A \x1b[2J B"
CLIPBOARD = "A \x1b]52;c;cm0=\x1b\\ B"
TITLE = "\x9d0;all is well\x9c"


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, stream: str, act) -> bytes:
    """What a terminal is sent: rich itself drops some characters, and other ones where there is no terminal."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        console = Console(file=terminal, soft_wrap=True, highlight=False, force_terminal=True, width=300)
        monkeypatch.setattr(output, stream, console)
        act()
    sent = os.read(ours, 65536)
    os.close(ours)
    return sent


@pytest.mark.parametrize("text", [CLEARS, CLIPBOARD, TITLE, "A\x1bcB", "A\x07\x08\x0b\x0c\x7fB"])
@pytest.mark.parametrize(("stream", "act"), [("stdout", output.say), ("stderr", output.note)])
def test_a_terminal_obeys_nothing_of_a_line(monkeypatch, stream, act, text) -> None:
    sent = on_a_terminal(monkeypatch, stream, lambda: act(text)).decode()
    assert output.visible(text) in sent
    assert not set(sent.rstrip("\r\n")) & {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))}


def test_a_terminal_obeys_nothing_of_a_table(monkeypatch) -> None:
    def show() -> None:
        output.show_table(CLEARS, ("name", "value"), [(CLIPBOARD, {TITLE: [CLEARS]})])

    sent = on_a_terminal(monkeypatch, "stdout", show).decode()
    for text in (CLEARS, CLIPBOARD, TITLE):
        assert output.visible(text) in sent
    # Rich's own sequences set the style, and nothing else.
    assert all(part.split("m")[0].strip("0123456789;") == "" for part in sent.split("\x1b[")[1:])
    assert "\x1b]" not in sent
    assert "\x9d" not in sent


def test_a_device_cannot_write_a_second_line_or_turn_the_order_round(capsys, monkeypatch) -> None:
    monkeypatch.setattr(output, "stdout", Console(soft_wrap=True, highlight=False, width=300))
    output.say("device-1 says: \nAs assigned.\u202eevil\u2066\u2028")
    assert capsys.readouterr().out == "device-1 says: \\x0aAs assigned.\\u202eevil\\u2066\\u2028\n"


def test_a_half_of_a_surrogate_pair_is_shown_and_breaks_nothing(capsys, monkeypatch) -> None:
    monkeypatch.setattr(output, "stdout", Console(soft_wrap=True, highlight=False, width=300))
    output.say("\ud800")
    assert capsys.readouterr().out == "\\ud800\n"


def test_other_writing_stays_as_it_is() -> None:
    text = "Größe 5 µm\tñandú 你好 👩‍🔬 \\x1b"
    assert output.visible(text) == text


def test_json_is_left_to_json(capsys) -> None:
    output.show_json({"detail": CLEARS})
    said = capsys.readouterr().out
    assert "\\u001b[2J" in said
    assert "\x1b" not in said


@given(st.text())
def test_what_is_visible_is_one_line_and_prints(text) -> None:
    shown = output.visible(text)
    assert len(shown.splitlines()) <= 1
    assert shown.replace("\t", " ").encode("utf-8").decode() == shown.replace("\t", " ")
    assert output.visible(shown) == shown
