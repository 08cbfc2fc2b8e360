"""Which devices count, and which reports count against a candidate."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import skerry_agent
from skerry_agent.core import lifecycle
from skerry_agent.failures import OF_THIS_DEVICE
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
    "code",
    [
        "trial_crashed",
        "golden_failed",
        "model_damaged",
        "malformed_manifest",
        "attempts_exhausted",
        "a_code_of_tomorrow",
    ],
)
def test_what_speaks_of_the_bundle_counts_against_it_and_so_does_what_nobody_knows(code: str) -> None:
    assert eligibility.is_verdict_on_bundle(code)


def on_the_way() -> Iterator[str]:
    """Every code by which a courier, or whoever starts one or a worker, says that the try may be made again or the device lacks something."""
    agent = Path(skerry_agent.__file__).parent
    for path in (
        agent / "errand.py",
        agent / "workers.py",
        agent / "durable.py",
        *sorted((agent / "courier").glob("*.py")),
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("Transient", "Degraded")
            ):
                assert isinstance(node.args[0], ast.Constant), ast.unparse(node)
                yield str(node.args[0].value)


def test_what_an_agent_calls_passing_or_its_own_lack_is_no_verdict_on_the_bundle() -> None:
    codes = set(on_the_way())
    assert {"courier_crashed", "process_not_started", "busy", "unreachable", "storage_failed"} <= codes
    assert not [code for code in sorted(codes) if eligibility.is_verdict_on_bundle(code)]


def test_what_an_agent_never_gives_a_bundle_up_for_or_calls_its_own_is_no_verdict_on_the_bundle() -> None:
    # A floor is the model's: a candidate below it is no good for anybody.
    passing = (lifecycle.MOMENTARY | OF_THIS_DEVICE) - {"below_floor"}
    assert {"store_full", "not_enough_disk", "no_variant"} <= passing
    assert not [code for code in sorted(passing) if eligibility.is_verdict_on_bundle(code)]


@pytest.mark.parametrize(
    "code",
    [
        "",
        "unreachable",
        "timeout",
        "no_variant",
        "not_enough_disk",
        "withdrawn",
        "interrupted",
        "mirror_wrong",
        "bad_signature",
        "malformed_metadata",
        "hash_mismatch",
        "size_mismatch",
        "cannot_decrypt",
        "bad_ca",
        "no_memory_folder",
    ],
)
def test_what_speaks_of_the_device_the_network_or_the_plan_does_not(code: str) -> None:
    assert not eligibility.is_verdict_on_bundle(code)
