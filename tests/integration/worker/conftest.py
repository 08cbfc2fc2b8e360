from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import models
from tests.integration.worker.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as found:
        yield found
        assert not found.gaps, "a window did not begin where the ring's last one ended"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A float classifier with four features."""
    models.build_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"
