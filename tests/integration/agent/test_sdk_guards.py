"""Policies and streams of a manifest hold in an application's own process as they do in a worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from skerry_agent import sdk
from skerry_contract import manifest as mf

from tests import models, streaming
from tests.integration.agent.rig import Device, Server, wait_for
from tests.integration.worker.test_guards import guarded


def opened(make_device: Callable[..., Device], make: Callable[[Path], Path]) -> sdk.Model:
    device = make_device(trial_inferences=0, trial_s=0.5)
    folder = make(device.folder / "bundle-1.0.0")
    digest = mf.digest((folder / mf.MANIFEST_FILE).read_bytes())
    device.world["bundles"][digest] = str(folder)
    device.publish(digest)
    device.start()
    device.wait_running("1.0.0")
    return sdk.open("gas", socket=device.state_dir / "run" / "apps.sock", wait_s=30)


def tallies(server: Server, wanted: dict[str, int]) -> None:
    def sums() -> dict[str, int]:
        found: dict[str, int] = {}
        for window in server.windows():
            for name, n in window.tallies.items():
                found[name] = found.get(name, 0) + n
        return found

    wait_for(lambda: sums() == wanted, why=lambda: f"{wanted}, got {sums()}")


def test_values_are_imputed_refused_and_counted_by_kind(make_device: Callable[..., Device], server: Server) -> None:
    model = opened(
        make_device,
        lambda folder: guarded(
            folder,
            f0={"on_null": "impute", "impute": 0.5},
            f1={"on_null": "reject", "on_stale": "reject", "ttl_s": 1.0},
        ),
    )
    with model:
        x, _ = models.rows(1)
        row = np.ascontiguousarray(x[:1], np.float32)
        holed, filled, wrong = row.copy(), row.copy(), row.copy()
        holed[0, 0], filled[0, 0], wrong[0, 1] = np.nan, 0.5, np.nan
        got = model.infer({"x": holed}).outputs["probabilities"]
        np.testing.assert_allclose(got, models.probabilities(filled), atol=1e-5)
        with pytest.raises(sdk.BadInput):
            model.infer({"x": wrong})
        with pytest.raises(sdk.BadInput):
            model.infer({"x": row}, age_ms=5000)
        with pytest.raises(sdk.BadInput, match="age_ms"):
            model.infer({"x": row}, age_ms=-1)
        assert model.infer({"x": row}, age_ms=20).outputs["probabilities"].shape == (1, 3)
        with pytest.raises(sdk.BadInput, match="keeps no state"):
            model.infer({"x": row}, stream="a")
    tallies(server, {"null.imputed": 1, "null.rejected": 1, "stale.rejected": 1})
    # What came after the last of them may stand in a later window.
    wait_for(lambda: sum(window.counts.invalid for window in server.windows()) >= 4, why="four refused")
    assert sum(window.counts.invalid for window in server.windows()) == 4
    assert sum(window.freshness.n for window in server.windows()) == 1


def test_streams_of_a_stateful_model_do_not_mix(make_device: Callable[..., Device]) -> None:
    model = opened(make_device, streaming.build)
    with model:
        ((name, dtype),) = model.inputs().items()
        shape = model.shapes()[name]
        one = np.ones([1 if n < 0 else n for n in shape], dtype)

        def ask(stream: str | None, **marks: bool) -> list[float]:
            answer = model.infer({name: one}, stream=stream, **marks)
            return [float(v) for v in next(iter(answer.outputs.values())).ravel()]

        alone = ask(None)
        first, second = ask("a"), ask("a")
        assert first == alone
        assert second != first, "it remembers"
        assert ask("b") == first
        assert ask("a", begin=True) == first
        assert ask(None) == alone
