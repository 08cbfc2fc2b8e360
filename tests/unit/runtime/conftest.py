"""Bundles on disk, made by tests/models.py, which is loaded by its path: tests is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

MODELS = Path(__file__).parents[2] / "models.py"


@pytest.fixture(scope="session")
def models() -> ModuleType:
    name = "skerry_test_models"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, MODELS)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
