"""The examples in the docstrings of the server's core are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import skerry_server.core


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(skerry_server.core.__path__)])
def test_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(f"skerry_server.core.{name}"))
    assert failed == 0
