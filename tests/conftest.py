"""What all tests share: bundles on disk; hypothesis without deadlines (tests share two cores with real fleets) and a thorough profile."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
from hypothesis import settings

settings.register_profile("usual", deadline=None, print_blob=True)
settings.register_profile("thorough", deadline=None, print_blob=True, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """Maker of bundles; loaded where it is asked for, since it brings both runtimes' makers of files."""
    return importlib.import_module("tests.models")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of whole processes first: by file they go to the next free worker, and a long one must not be the last."""
    order = {"system": 0, "integration": 1}
    items.sort(key=lambda item: order.get(item.path.relative_to(item.config.rootpath).parts[1], 2))
