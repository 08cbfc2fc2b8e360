"""Paths in the update repository and in bundles lead nowhere else."""

from __future__ import annotations

import fnmatch
import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import ids, layout
from skerry_contract.errors import Malformed

from tests.unit.contract import values


def delegated(path: str, patterns: tuple[str, ...]) -> bool:
    """TUF's rule: as many segments, each matched by itself."""
    return any(
        path.count("/") == pattern.count("/")
        and all(fnmatch.fnmatchcase(a, b) for a, b in zip(path.split("/"), pattern.split("/"), strict=True))
        for pattern in patterns
    )


@given(values.names, st.sampled_from(["1.0.0", "10.2.3-rc.1"]))
def test_manifests_and_floors_belong_to_the_catalog_and_groups_to_the_fleet(name: str, version: str) -> None:
    manifest = layout.manifest_target(ids.ModelName(name), version)
    document = layout.group_target(ids.GroupName(name))
    assert delegated(manifest, layout.CATALOG_PATHS)
    assert delegated(layout.FLOORS_TARGET, layout.CATALOG_PATHS)
    assert delegated(document, layout.FLEET_PATHS)
    assert not delegated(manifest, layout.FLEET_PATHS)
    assert not delegated(document, layout.CATALOG_PATHS)


def test_files_of_targets_carry_their_hash_and_blobs_their_digest() -> None:
    digest = "ab" * 32
    manifest = layout.manifest_target(ids.ModelName("gas"), "1.0.0")
    assert layout.target_file(manifest, digest) == f"targets/catalog/gas/1.0.0/{digest}.manifest.json"
    assert layout.target_file(layout.FLOORS_TARGET, digest) == f"targets/catalog/{digest}.floors.json"
    assert layout.blob(digest) == f"blobs/sha256/ab/{digest}"
    assert layout.delta(digest, "cd" * 32) == f"deltas/{digest}/{'cd' * 32}"


@pytest.mark.parametrize("digest", ["", "../" + "a" * 61, "A" * 64, "a" * 63])
def test_only_a_digest_makes_a_path(digest: str) -> None:
    for build in (layout.blob, lambda d: layout.delta(d, "a" * 64), lambda d: layout.delta("a" * 64, d)):
        with pytest.raises(Malformed):
            build(digest)
    with pytest.raises(Malformed):
        layout.target_file("catalog/floors.json", digest)


@pytest.mark.parametrize(
    ("model", "version"), [("..", "1.0.0"), ("gas", "../1"), ("a/b", "1.0.0"), ("gas", "1.0.0/..")]
)
def test_a_model_or_version_cannot_climb(model: str, version: str) -> None:
    with pytest.raises(Malformed):
        layout.manifest_target(ids.ModelName(model), version)


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "/etc/passwd", "..", "../x", "a/../b", "a/..", ".", "./a", "a//b", "a/", ".hidden", "a/.ssh", "a\\b", "C:x",
        "a b", "a\0b", "a\n", "é", "a" * 201, "\uff0e\uff0e/x", "%2e%2e/x", None, 5, b"a",
    ],
)  # fmt: skip
def test_a_path_that_could_leave_the_bundle_is_refused(text: object) -> None:
    with pytest.raises(Malformed, match="bundle path"):
        layout.bundle_path(text)


@pytest.mark.parametrize("text", ["model.onnx", "golden/cases.jsonl", "a-b_c.d/e.f", "x" * 200])
def test_plain_paths_pass_unchanged(text: str) -> None:
    assert layout.bundle_path(text) == text


@given(st.text(max_size=40) | st.from_regex(r"[a./_-]{1,12}", fullmatch=True))
def test_whatever_passes_stays_below_the_folder(text: str) -> None:
    try:
        path = layout.bundle_path(text)
    except Malformed:
        return
    assert posixpath.normpath(path) == path
    assert posixpath.join("/bundle", path).startswith("/bundle/")
    assert not path.startswith(".")
