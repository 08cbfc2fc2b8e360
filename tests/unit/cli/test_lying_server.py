"""What the operator's tool believes of a server that is not honest; the honest one is in tests/integration/cli."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from skerry_cli import publishing
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
