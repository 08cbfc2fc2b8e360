"""Runtimes that break, are short of memory, kill their process, and come back: the device keeps a model that runs, and says why."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from skerry_cli.demo import models as demo

from tests.integration.agent.rig import Device, Server, wait_for
from tests.integration.agent.test_doctor import examine, verdict
from tests.integration.agent.test_update import offer_both_variants

pytest.importorskip("ai_edge_litert", reason="the extra litert is not installed")

IMPORT = 'raise ImportError("numpy.core.multiarray failed to import")\n'
LIBRARY = 'import ctypes\nctypes.CDLL("/nowhere/libLiteRt.so")\n'
ILLEGAL = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
SHORT = 'raise ImportError("libpywrap_litert_common.so: failed to map segment from shared object")\n'
KILLED = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"


class LiteRt:
    """A package in front of the installed LiteRt: it does harm while it is told to, and is the real one otherwise."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._harm = folder / "harm"
        package = folder / "front" / "ai_edge_litert"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(
            "import importlib, pathlib, sys\n"
            f"harm = pathlib.Path({str(self._harm)!r})\n"
            "if harm.exists():\n"
            "    text = harm.read_text()\n"
            f"    {str(folder)!r} in text and harm.unlink()\n"
            "    exec(text)\n"
            f"sys.path[:] = [entry for entry in sys.path if entry != {str(package.parent)!r}]\n"
            "del sys.modules['ai_edge_litert']\n"
            "importlib.invalidate_caches()\n"
            "importlib.import_module('ai_edge_litert')\n"
        )
        (package / "interpreter.py").write_text("")
        self._once = f"# once: {folder}\n"
        monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")

    def breaks(self, harm: str, *, once: bool = False) -> None:
        self._harm.write_text((self._once if once else "") + harm)

    def works(self) -> None:
        self._harm.unlink()


@pytest.fixture
def litert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LiteRt:
    return LiteRt(tmp_path, monkeypatch)


@pytest.fixture
def on_tflite(device: Device, server: Server, litert: LiteRt) -> Device:
    """A device that prefers TFLite and has confirmed a bundle on it."""
    offer_both_variants(device, prefer='["tflite", "onnx"]')
    device.start()
    device.wait_running("1.0.0", "confirmed_on_golden")
    assert variant(device) == demo.TFLITE
    return device


def variant(device: Device) -> str:
    return str(device.status()["running"]["gas"]["variant"])


def runs_on_onnx(device: Device) -> None:
    wait_for(
        lambda: device.running() == ("1.0.0", "confirmed_on_golden") and variant(device) == demo.ONNX,
        why=lambda: f"the other variant: {device.status()['update']} {device.log()[-3000:]}",
    )


def verdicts(device: Device, server: Server) -> set[str]:
    """Of all events so far: the device's own state is seen before what it tells of it has arrived."""
    wait_for(lambda: device.status()["outbox"]["pending"] == 0, why="all events")
    return {event.code for event in server.events()} - {""}


@pytest.mark.parametrize("harm", [IMPORT, LIBRARY, ILLEGAL], ids=["import", "library", "illegal"])
def test_a_runtime_that_does_not_work_is_no_verdict_on_the_bundle(
    device: Device, server: Server, litert: LiteRt, harm: str
) -> None:
    offer_both_variants(device, prefer='["tflite", "onnx"]')
    litert.breaks(harm)
    device.start()
    runs_on_onnx(device)
    assert verdicts(device, server) == {"runtime_missing"}
    assert list(device.status()["runtimes"]) == ["onnx"]


def test_a_loading_worker_that_is_killed_from_outside_says_nothing_of_the_runtime(
    device: Device, server: Server, litert: LiteRt
) -> None:
    offer_both_variants(device, prefer='["tflite", "onnx"]')
    litert.breaks(KILLED, once=True)
    device.start()
    device.wait_running("1.0.0", "confirmed_on_golden")
    assert verdicts(device, server) == {"runtime_crashed"}
    assert variant(device) == demo.TFLITE


def test_a_moment_without_memory_costs_one_try_and_not_the_runtime(
    device: Device, server: Server, litert: LiteRt
) -> None:
    offer_both_variants(device, prefer='["tflite"]')
    litert.breaks(SHORT, once=True)
    device.start()
    device.wait_running("1.0.0", "confirmed_on_golden")
    assert verdicts(device, server) == {"not_enough_memory"}
    assert "does not work here" not in device.log()


def test_a_runtime_that_breaks_between_two_starts_leaves_the_bundle_on_the_other_one(
    on_tflite: Device, server: Server, litert: LiteRt
) -> None:
    assert on_tflite.stop() == 0
    litert.breaks(IMPORT)
    on_tflite.start()
    runs_on_onnx(on_tflite)
    assert verdict(examine(on_tflite), "worker")[0] == "ok"
    told = wait_for(lambda: [e for e in server.events("worker") if e.code == "runtime_missing"], why="the event")
    assert "numpy.core.multiarray" in told[0].data["detail"]
    assert told[0].data["variant"] == demo.TFLITE
    # The next start is of what runs.
    assert on_tflite.stop() == 0
    on_tflite.start()
    runs_on_onnx(on_tflite)
    pointers = json.loads((on_tflite.state_dir / "slots" / "pointers.json").read_bytes())
    assert pointers["models"]["gas"]["confirmed"]["variant"] == demo.ONNX
    assert not list((on_tflite.state_dir / "slots").glob("*/*.tflite"))


def test_a_runtime_that_breaks_under_a_worker_shows_when_that_dies_and_the_other_variant_comes(
    on_tflite: Device, litert: LiteRt
) -> None:
    litert.breaks(LIBRARY)
    os.kill(on_tflite.status()["worker"]["pid"], signal.SIGKILL)
    runs_on_onnx(on_tflite)


def test_without_another_variant_the_device_says_why_and_serves_again_when_the_runtime_works(
    device: Device, server: Server, litert: LiteRt
) -> None:
    offer_both_variants(device, prefer='["tflite"]')
    device.start()
    device.wait_running("1.0.0", "confirmed_on_golden")
    assert device.stop() == 0
    litert.breaks(IMPORT)
    device.start()
    device.wait_update("idle", "runtime_missing")
    assert device.status()["running"] == {}
    # The model that does not start is the one that a person means who names none.
    assert "no bundle of gas to go back to" in device.call("POST", "/skerry/v1/revert", {}).body["error"]
    found = examine(device)
    assert any(f["verdict"] == "fail" and "tflite" in f["detail"] for f in found["runtime"])
    assert verdict(found, "worker")[0] == "fail"
    update = verdict(found, "update")
    assert update[0] == "warn"
    assert "runtime_missing" in update[1]
    litert.works()
    device.wait_running("1.0.0")
    wait_for(lambda: list(device.status()["runtimes"]) == ["tflite"], why="the runtime")
    assert all(f["verdict"] == "ok" for f in examine(device)["runtime"])


def test_a_runtime_that_was_left_out_is_tried_again_after_a_wait(
    make_device: Callable[..., Device], server: Server, litert: LiteRt
) -> None:
    device = make_device(backoff_scale=0.002)
    offer_both_variants(device, prefer='["tflite"]')
    litert.breaks(IMPORT)
    device.start()
    wait_for(lambda: "does not work here" in device.log(), why=lambda: device.log()[-3000:])
    litert.works()
    device.wait_running("1.0.0", "confirmed_on_golden")
    assert verdicts(device, server) == {"runtime_missing"}


def test_doctor_names_a_runtime_that_is_installed_and_left_out(device: Device, server: Server, litert: LiteRt) -> None:
    offer_both_variants(device, prefer='["tflite", "onnx"]')
    litert.breaks(IMPORT, once=True)
    device.start()
    runs_on_onnx(device)
    (left_out,) = [f for f in examine(device)["runtime"] if f["verdict"] == "fail"]
    assert "tflite" in left_out["detail"]
    assert left_out["advice"]
