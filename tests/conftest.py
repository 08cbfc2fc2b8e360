"""What all tests share: bundles on disk; hypothesis without deadlines (tests share two cores with real fleets) and profiles with more examples."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
from hypothesis import settings

# Each run draws anew, so that few examples a run are many over the runs; before a release `make test-slow` draws many at once.
settings.register_profile("usual", deadline=None, print_blob=True, max_examples=50)
settings.register_profile("many", deadline=None, print_blob=True, max_examples=400)
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
