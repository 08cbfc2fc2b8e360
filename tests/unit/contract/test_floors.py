"""The floors, signed by the approvers."""

from __future__ import annotations

import pytest
from skerry_contract import canonical, floors
from skerry_contract.errors import Malformed, UnsupportedVersion


def test_floors_are_read_back() -> None:
    assert floors.parse(floors.encode({"gas": "1.2.0", "pump": "0.1.0-rc.1"})) == {"gas": "1.2.0", "pump": "0.1.0-rc.1"}


@pytest.mark.parametrize(
    "value",
    [
        {}, {"schema": 1}, {"schema": 1, "floors": []}, {"schema": 0, "floors": {}}, {"schema": 1, "floors": {"Gas": "1.0.0"}},
        {"schema": 1, "floors": {"gas": "1"}}, {"schema": 1, "floors": {"gas": 1}}, {"schema": "1", "floors": {}},
    ],
)  # fmt: skip
def test_what_are_no_floors_is_refused(value: dict) -> None:
    with pytest.raises(Malformed):
        floors.parse(canonical.encode(value))


def test_a_newer_schema_is_told_from_a_broken_one() -> None:
    with pytest.raises(UnsupportedVersion):
        floors.parse(canonical.encode({"schema": 2, "floors": {}}))


@pytest.mark.parametrize(
    ("version", "allowed"),
    [("1.2.0", True), ("1.10.0", True), ("2.0.0-rc.1", True), ("1.2.0-rc.1", False), ("1.1.99", False)],
)
def test_a_version_below_the_floor_may_not_be_activated(version: str, allowed: bool) -> None:
    assert floors.allows({"gas": "1.2.0"}, "gas", version) is allowed
    assert floors.allows({}, "gas", version)
