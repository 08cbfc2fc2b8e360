"""What goes into a path is one name, whatever somebody types."""

from __future__ import annotations

import pytest
from skerry_cli.client import quote
from skerry_cli.errors import Usage


@pytest.mark.parametrize("part", ["", ".", "..", "../../x", "a/b", "/"])
def test_what_would_leave_its_segment_of_a_path_is_refused_by_name(part: str) -> None:
    with pytest.raises(Usage, match="wanted a name or an id, got"):
        quote(part)


def test_the_rest_is_one_segment() -> None:
    assert quote("r-1") == "r-1"
    assert quote("what? 100%") == "what%3F%20100%25"
