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
