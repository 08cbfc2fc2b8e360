"""Bundles on the operator's disk: built from a spec, read back, checked file by file."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skerry_cli import bundle
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_contract import canonical
from skerry_contract import manifest as m
from skerry_runtime import transforms

from tests.unit.cli.conftest import CREATED, spec


def build(source: Path, tmp_path: Path, **changes: Any) -> bundle.Bundle:
    return bundle.build_bundle(spec(**changes), source=source, out=tmp_path / "out", created=CREATED)


def test_a_built_bundle_is_what_a_reader_reads(source: Path, tmp_path: Path) -> None:
    built = build(source, tmp_path)
    read = bundle.read_bundle(tmp_path / "out")
    assert read.data == built.data
    assert read.digest == canonical.sha256((tmp_path / "out" / m.MANIFEST_FILE).read_bytes())
    assert {file.path: file.size for file in read.manifest.files()} == {"model.onnx": 7, "golden.jsonl": 30}
    assert read.manifest.created == CREATED
    bundle.check_files(read)


def test_the_same_spec_gives_the_same_digest(source: Path, tmp_path: Path) -> None:
    first = bundle.build_bundle(spec(), source=source, out=tmp_path / "a", created=CREATED)
    second = bundle.build_bundle(spec(), source=source, out=tmp_path / "b", created=CREATED)
    assert first.digest == second.digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "1.0"}, "version: wanted MAJOR.MINOR.PATCH"),
        ({"model": "Gas"}, "model: wanted [a-z0-9]"),
        ({"inputs": []}, "$.inputs: wanted at least one"),
        ({"variants": []}, "$.variants: wanted at least one"),
        ({"variants": "none"}, "$.variants: wanted a list, got str"),
        ({"schema": 99}, "schema 99 is newer"),
        ({"owner": "me"}, "$.owner"),
        ({"features": [{"name": "f", "input": "z", "column": 0}]}, "got 'z'"),
        ({"reference": {"n": {1, 2}}}, "$.reference.n"),
        ({"owner": {"name": object(), "contact": "x"}}, "cannot be written as JSON"),
    ],
)
def test_what_the_contract_refuses_is_never_built(
    source: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(Usage) as error:
        build(source, tmp_path, **changes)
    assert said in error.value.message
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_with_the_specs_file(source: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"owner": {"team": "x", "contact": 5}}, r"^a/spec\.toml: manifest at \$\.owner\.contact: wanted text, got 5$"),
        ({"variants": "none"}, r"^a/spec\.toml: \$\.variants: wanted a list, got str$"),
    ):
        with pytest.raises(Usage, match=said):
            bundle.build_bundle(
                {**spec(), **changes}, source=source, out=tmp_path / "out", created=CREATED, what="a/spec.toml"
            )


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../b", ".hidden", "", "manifest.json", 7])
def test_a_path_that_leaves_the_bundle_is_refused(source: Path, tmp_path: Path, path: object) -> None:
    variant = {**spec()["variants"][0], "files": ["model.onnx", "golden.jsonl", {"path": path, "from": "model.onnx"}]}
    with pytest.raises(Usage):
        build(source, tmp_path, variants=[variant])
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(source: Path, tmp_path: Path) -> None:
    (source / "golden.jsonl").unlink()
    with pytest.raises(Usage, match=r"golden\.jsonl: no such file"):
        build(source, tmp_path)


def test_a_folder_in_use_is_never_written_over(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(Usage, match="not empty"):
        build(source, tmp_path)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("attack", ["flip", "longer", "missing", "added", "link"])
def test_a_changed_folder_is_refused(source: Path, tmp_path: Path, attack: str) -> None:
    built = build(source, tmp_path)
    model = built.folder / "model.onnx"
    if attack == "flip":
        model.write_bytes(b"b model")
    elif attack == "longer":
        model.write_bytes(b"a model!")
    elif attack == "missing":
        model.unlink()
    elif attack == "added":
        (built.folder / "extra.bin").write_bytes(b"x")
    else:
        model.unlink()
        model.symlink_to(source / "model.onnx")
    with pytest.raises(RefusedForSafety):
        bundle.check_files(bundle.read_bundle(built.folder))


def test_a_manifest_that_is_not_canonical_is_refused(source: Path, tmp_path: Path) -> None:
    built = build(source, tmp_path)
    path = built.folder / m.MANIFEST_FILE
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(Usage, match="canonical"):
        bundle.read_bundle(built.folder)


def test_a_spec_takes_long_parts_from_other_files(tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text('{"reference": {"n": 3}}')
    (tmp_path / "spec.toml").write_text('model = "gas"\ninclude = ["reference.json"]\n')
    assert bundle.read_spec(tmp_path / "spec.toml") == {"model": "gas", "reference": {"n": 3}}
    (tmp_path / "reference.json").write_text('{"model": "other"}')
    with pytest.raises(Usage, match="model stands in"):
        bundle.read_spec(tmp_path / "spec.toml")


@pytest.mark.parametrize("text", ["model = ", "\xff", "[" * 200_000])
def test_a_spec_that_does_not_parse_is_one_clear_error(tmp_path: Path, text: str) -> None:
    for name in ("spec.toml", "spec.json"):
        path = tmp_path / name
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(Usage, match="wanted"):
            bundle.read_spec(path)


def test_the_data_file_travels_with_its_licence() -> None:
    found = importlib.util.find_spec("skerry_cli.demo")
    assert found is not None and found.origin is not None
    notice = (Path(found.origin).parent / "data" / "LICENCE.txt").read_text()
    assert "CC BY 4.0" in notice and "10.24432/C5MK6M" in notice and "Vergara" in notice


def test_what_the_how_to_shows_can_be_built_and_run(source: Path, tmp_path: Path) -> None:
    """The blocks of docs/howto/transforms-guards-streams.md, as an engineer would copy them into a spec."""
    page = (Path(__file__).parents[3] / "docs" / "howto" / "transforms-guards-streams.md").read_text()
    (steps,) = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    guards, streams = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    names = ("guards", "states")
    for name, text in zip(names, (guards, streams), strict=True):
        (source / f"{name}.toml").write_text(text.replace("requires", f"requires_{name}"))
    parts = [bundle.read_spec(source / f"{name}.toml") for name in names]
    needed = [part.pop(f"requires_{name}")[0] for name, part in zip(names, parts, strict=True)]
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    built = build(source, tmp_path, requires=needed, inputs=inputs, **steps, **parts[0], **parts[1]).manifest
    assert needed == list(names)
    assert (built.features[0].on_outside, built.fallback) == ("reject", "leaks-small")
    assert built.streams is not None
    assert built.streams.states[0].shape == (2, 1, 128)
    raw = np.array([[19.0, 1010.0], [np.nan, 1012.0], [21.0, 1011.0]], np.float32)
    found = transforms.apply(built.transforms.pre, raw)
    assert found.shape == (3, 6)
    assert not np.isnan(found).any()
