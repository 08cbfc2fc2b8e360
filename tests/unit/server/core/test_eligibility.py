"""Which devices count, and which reports count against a candidate."""

from __future__ import annotations

from pathlib import Path

import pytest
from skerry_contract import manifest as m
from skerry_server.core import eligibility

from tests import models


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> m.Manifest:
    folder: Path = tmp_path_factory.mktemp("bundle")
    models.build_bundle(folder)
    return m.parse((folder / "manifest.json").read_bytes())


def test_a_device_needs_a_variant_for_its_runtime_and_architecture(manifest: m.Manifest) -> None:
    assert eligibility.has_variant(manifest, {"runtimes": {"onnx": "1.20"}, "arch": "armv7l"})
    assert not eligibility.has_variant(manifest, {"runtimes": {"tflite": "2.14"}, "arch": "armv7l"})
    assert eligibility.has_variant(manifest, {}), "a device that has not said yet decides by itself"


@pytest.mark.parametrize(
    "code", ["trial_crashed", "golden_failed", "hash_mismatch", "attempts_exhausted", "a_code_of_tomorrow"]
)
def test_what_speaks_of_the_bundle_counts_against_it_and_so_does_what_nobody_knows(code: str) -> None:
    assert eligibility.is_verdict_on_bundle(code)


@pytest.mark.parametrize(
    "code", ["", "unreachable", "timeout", "no_variant", "not_enough_disk", "withdrawn", "interrupted"]
)
def test_what_speaks_of_the_device_the_network_or_the_plan_does_not(code: str) -> None:
    assert not eligibility.is_verdict_on_bundle(code)
