"""Examples in the docstrings of the pure code are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

PURE = ("skerry_contract", "skerry_agent.core", "skerry_server.core")


def modules() -> list[str]:
    found = []
    for name in PURE:
        package = importlib.import_module(name)
        found += [name, *(f"{name}.{module.name}" for module in pkgutil.iter_modules(package.__path__))]
    return found


@pytest.mark.parametrize("name", modules())
def test_examples_are_true(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed
