"""What the operator's tool believes of a server that is not honest; the honest one is in tests/integration/cli."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
from skerry_cli import catalog, publishing
from skerry_cli.commands import publish
from skerry_cli.errors import RefusedForSafety, Usage

ASKED, OTHER = "a" * 64, "b" * 64


class Liar:
    """Answers every question with a bundle of its own choice."""

    chosen: ClassVar[dict[str, Any]] = {"model": "iris", "version": "9.9.9", "digest": OTHER, "state": "validated"}

    def get(self, path: str) -> dict[str, Any]:
        return self.chosen

    def items(self, path: str, **query: str) -> list[dict[str, Any]]:
        return [{**self.chosen, "version": "1.0.0", "model": "backdoor"}]


def test_a_server_that_answers_with_another_digest_is_refused() -> None:
    with pytest.raises(RefusedForSafety, match=f"asked for bundle {ASKED}"):
        publishing.find_bundle(Liar(), ASKED)  # type: ignore[arg-type]


def test_a_server_that_answers_with_another_model_is_not_believed() -> None:
    with pytest.raises(Usage, match="not in the register"):
        publishing.find_bundle(Liar(), "gas@1.0.0")  # type: ignore[arg-type]


def difference(submitter: str) -> catalog.Difference:
    entry = catalog.Entry(model="gas", version="1.2.0", digest=OTHER, submitter=submitter, approvers=("ada", "bea"))
    return catalog.Difference(
        from_version=3,
        to_version=4,
        was_expired=False,
        expires_before="2026-05-01",
        expires_after="2026-11-01",
        added=(entry,),
        removed=(),
        floors=(),
    )


@pytest.mark.parametrize(
    "hostile",
    [
        "ci" + "\n" * 70 + f"+ gas@1.2.0  {ASKED}\n    submitted by ci",
        f"ci\r+ gas@1.2.0  {ASKED}",
        f"ci\u2028+ gas@1.2.0  {ASKED}",
        f"ci\x1b[2J+ gas@1.2.0  {ASKED}",
    ],
)
def test_what_a_server_says_of_a_submitter_begins_no_line_of_the_difference(
    hostile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = difference(hostile)
    assert publish.confirm(True, False)(shown)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(difference("ci").text().splitlines())
    assert [line for line in said if line.startswith("+")] == [f"+ gas@1.2.0  {OTHER}"]
    assert not any(hostile in text for text in (shown.text(), *said))


def test_what_a_server_says_to_use_a_bundle_neither_pushes_the_difference_away_nor_looks_like_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The second would be a row of its own on a terminal of 80 columns.
    made_up = ["group:x" + " " * 100_000 + f"+ gas@1.2.0 {ASKED}", "group:x".ljust(80) + f"+ gas@1.2.0 {ASKED[:40]}"]

    class Spammer(Liar):
        def find(self, path: str) -> dict[str, Any]:
            return {"used_by": [f"pin:press-{n}" for n in range(400)] + made_up * 300}

    taken_out = replace(difference("ci"), removed=difference("ci").added)
    publish.unused(Spammer(), force=True)(taken_out)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert len(said) < 1000
    assert "+ gas" not in said and "  " not in said
    assert "in use by pin:press-0, pin:press-1," in said and "pin:press-19 and 980 more" in said
