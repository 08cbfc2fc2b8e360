from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CREATED = "2026-01-01T00:00:00Z"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with the two files of a small bundle."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"a model")
    (folder / "golden.jsonl").write_bytes(b'{"inputs": [], "outputs": []}\n')
    return folder


def spec(**changes: Any) -> dict[str, Any]:
    """A spec that the contract accepts, with changes."""
    return {
        "model": "gas",
        "version": "1.0.0",
        "owner": {"name": "A", "contact": "a@example.org"},
        "licence": "Apache-2.0",
        "variants": [
            {
                "id": "onnx-int8",
                "runtime": "onnx",
                "model": "model.onnx",
                "files": ["model.onnx", "golden.jsonl"],
                "golden": {"cases": "golden.jsonl"},
                "needs": {"rss_mb": 10, "disk_mb": 1},
            }
        ],
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
        "reference": {"n": 0},
        **changes,
    }
