"""Which runtimes are installed, told by what an installer left beside them."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path

import pytest
from skerry_contract.manifest import UNKNOWN_RUNTIME
from skerry_runtime import engines


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, **distributions: str) -> None:
    """A folder with a module ``ai_edge_litert`` and the distributions' records (name_version -> Version in it)."""
    (folder / "ai_edge_litert").mkdir()
    (folder / "ai_edge_litert" / "__init__.py").write_text("")
    for name, version in distributions.items():
        made = folder / f"{name.replace('__', '-')}.dist-info"
        made.mkdir()
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.partition('__')[0]}\nVersion: {version}\n")
        (made / "top_level.txt").write_text("ai_edge_litert\n")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "ai_edge_litert"]:
        monkeypatch.delitem(sys.modules, name)


def test_what_stands_beside_a_module_is_what_its_distribution_records() -> None:
    assert engines.available()["onnx"] == importlib.metadata.version("onnxruntime")


def test_the_folders_name_tells_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, **{"ai_edge_litert__7.8.9": "7.8.9"})
    assert engines.available()["tflite"] == "7.8.9"


def test_after_an_upgrade_that_was_cut_short_the_records_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch, **{"ai_edge_litert__7.8.9": "7.8.9", "ai_edge_litert__8.0.0": "8.0.0"})
    assert engines.available()["tflite"] == importlib.metadata.version("ai-edge-litert")


def test_a_vendors_build_tells_the_version_of_its_own_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch, **{"ai_edge_litert_npu__3.1": "3.1"})
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert engines.available()["tflite"] == "3.1"


def test_a_module_that_nobody_recorded_has_no_known_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert engines.available()["tflite"] == UNKNOWN_RUNTIME
    shutil.rmtree(tmp_path / "ai_edge_litert")
    assert "tflite" not in engines.available()
