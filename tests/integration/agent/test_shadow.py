"""A bundle in shadow sees what is answered and answers nobody; whatever becomes of it, serving and its counts are as ever."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from skerry_contract import group, wire
from skerry_contract import window as w

from tests import models
from tests.integration.agent.rig import Device, Load, Server, wait_for

SETTINGS = group.Settings(shadow_share=1.0, shadow_cpu=1.0)


def confirmed(device: Device, version: str, digest: str) -> None:
    device.publish(digest, settings=SETTINGS)
    device.start()
    device.wait_running(version, "trial", "confirmed")
    device.infer(25)
    device.wait_running(version, "confirmed")


def in_shadow(device: Device, digest: str) -> int:
    """Puts a bundle in shadow of what runs and waits until it is shown something. Returns its process."""
    wait_for(lambda: shadow(device)["digest"] == digest and shadow(device)["running"], why=lambda: device.log()[-3000:])
    return int(shadow(device)["pid"])


def shadow(device: Device) -> dict:
    return dict(device.status()["shadows"]["gas"])


def seen(server: Server, candidate: str, bundle: str = "") -> w.Shadow:
    total = w.Shadow()
    for window in server.windows():
        if candidate in window.shadows and bundle in ("", window.key.bundle):
            assert window.counts == w.Counts(), "a shadow answers nobody"
            total = w.merge_shadows(total, window.shadows[candidate])
    return total


def samples(server: Server) -> list[wire.Sample]:
    with server.lock:
        found = [wire.decode(wire.Sample, r.body) for r in server.taken.values() if r.kind == "sample"]
    return [one for one in found if one.why == "shadow"]


def ask(device: Device, rows: int | np.ndarray) -> list[tuple[str, list[float]]]:
    """(prediction id, probabilities) of live rows, asked one by one."""
    x = models.rows(rows)[0] if isinstance(rows, int) else rows
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=30)
    found = []
    for row in x.tolist():
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, len(row)], "data": row}
        connection.request("POST", "/v2/models/gas/infer", json.dumps({"inputs": [tensor]}))
        answer = json.loads(connection.getresponse().read())
        found.append((answer["parameters"]["prediction_id"], answer["outputs"][0]["data"]))
    connection.close()
    return found


def label(device: Device, labels: list[tuple[str, int]]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=30)
    body = {"feedback": [{"id": ident, "label": truth} for ident, truth in labels]}
    connection.request("POST", "/skerry/v1/feedback", json.dumps(body))
    outcomes = json.loads(connection.getresponse().read())["feedback"]
    connection.close()
    assert {one["outcome"] for one in outcomes} == {"matched"}


def test_a_shadow_runs_as_the_configuration_says_and_what_it_answers_otherwise_is_kept(
    device: Device, server: Server
) -> None:
    device.config.write_text(f'{device.config.read_text()}[runtime]\nonnx_providers = ["CUDAExecutionProvider"]\n')
    stable, other = device.bundle("1.0.0", seed=1), device.bundle("1.1.0", seed=2)
    confirmed(device, "1.0.0", stable)
    settings = msgspec.structs.replace(SETTINGS, sample_rate=1e-9)
    device.publish(stable, shadow=other, settings=settings)
    device.sync()
    in_shadow(device, other)
    assert shadow(device)["runs_on"] == ["cpu"]
    assert shadow(device)["fallback"].startswith("CUDAExecutionProvider is not in this onnxruntime")
    # Between what they learned, two good bundles are of two minds now and then.
    x = np.random.default_rng(0).uniform(-10, 10, (2000, 4)).astype(np.float32)
    ours, theirs = (models.probabilities(x, seed=seed).argmax(1) for seed in (1, 2))
    x = np.concatenate([x[ours != theirs][:20], x[ours == theirs][:40]])
    answered = dict(ask(device, x))
    wait_for(lambda: seen(server, other).pairs == 60)
    differ = 60 - seen(server, other).agreed
    assert differ == 20
    kept = wait_for(lambda: len(found := samples(server)) == differ and found, why=lambda: f"got {samples(server)}")
    for one in kept:
        assert one.key.bundle == stable and one.extra["shadow"] == other
        assert one.outputs["probabilities"] == pytest.approx(answered[one.id], abs=1e-6)
        other_one = one.extra["candidate"]["probabilities"]
        assert other_one.index(max(other_one)) != answered[one.id].index(max(answered[one.id]))
    wait_for(lambda: sum(w.tallies.get("samples.shadow", 0) for w in server.windows()) == differ)


def test_every_request_of_the_share_is_paired_or_named_and_labels_say_who_was_right(
    device: Device, server: Server
) -> None:
    stable, other = device.bundle("1.0.0", seed=1), device.bundle("1.1.0", seed=2)
    confirmed(device, "1.0.0", stable)
    device.publish(stable, shadow=other, settings=SETTINGS)
    device.sync()
    in_shadow(device, other)
    answered = ask(device, 200)
    wait_for(lambda: seen(server, other).pairs + sum(seen(server, other).dropped.values()) == 200)
    found = seen(server, other, stable)
    assert found.pairs == 200, found.dropped
    # What the candidate says of the same rows, worked out apart.
    own = models.probabilities(models.rows(200)[0], seed=2)
    same = [max(range(len(p)), key=p.__getitem__) == int(q.argmax()) for (_, p), q in zip(answered, own, strict=True)]
    assert found.agreed == sum(same)
    assert found.slower.n + found.faster.n == found.distance.n == 200
    label(device, [(ident, int(q.argmax())) for (ident, _), q in zip(answered, own, strict=True)])
    wait_for(lambda: sum(seen(server, other).labelled) == 200)
    assert seen(server, other).labelled == (sum(same), 0, 200 - sum(same), 0)
    assert server.inferences(bundle=stable) == 225, "the shadow's part counts no inference"


def test_a_shadow_that_is_killed_comes_back_and_no_request_notices(device: Device, server: Server) -> None:
    stable, other = device.bundle("1.0.0", seed=1), device.bundle("1.1.0", seed=2)
    confirmed(device, "1.0.0", stable)
    device.publish(stable, shadow=other, settings=SETTINGS)
    device.sync()
    with Load(device) as load:
        for _ in range(2):
            pid = in_shadow(device, other)
            before = seen(server, other).pairs
            wait_for(lambda before=before: seen(server, other).pairs > before)
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: shadow(device)["pid"] not in (0, pid))
    assert load.failed == []
    assert {event.code for event in server.events("shadow")} == {"runtime_crashed"}
    assert server.events("worker") == []
    # A start finds its bundle where it was: nobody has to bring it again.
    device.kill()
    device.world["bundles"] = {}
    device.save()
    device.start()
    device.infer(1)
    in_shadow(device, other)


def test_a_shadow_follows_the_next_generation_and_a_promotion_puts_the_old_version_behind_it(
    device: Device, server: Server
) -> None:
    stable, other = device.bundle("1.0.0", seed=1), device.bundle("1.1.0", seed=2)
    confirmed(device, "1.0.0", stable)
    device.publish(stable, other, mode="shadow", settings=SETTINGS)
    device.sync()
    pid = in_shadow(device, other)
    ask(device, 20)
    wait_for(lambda: seen(server, other, stable).pairs == 20)
    # A worker that dies is replaced, and the shadow is shown what its successor answers.
    died = device.status()["worker"]["pid"]
    os.kill(died, signal.SIGKILL)
    wait_for(lambda: device.status()["worker"]["pid"] not in (0, died) and shadow(device)["running"])
    ask(device, 20)
    wait_for(lambda: seen(server, other, stable).pairs == 40)
    assert shadow(device)["pid"] == pid
    device.publish(other, shadow=stable, settings=SETTINGS)
    device.sync()
    device.wait_running("1.1.0", "trial", "confirmed")
    device.infer(25)
    device.wait_running("1.1.0", "confirmed")
    in_shadow(device, stable)
    ask(device, 20)
    wait_for(lambda: seen(server, stable, other).pairs >= 20)
    # Put back at once: its files are here, whatever has become of the repository's.
    shutil.rmtree(device.world["bundles"][stable])
    device.publish(stable, settings=SETTINGS)
    device.sync()
    device.wait_running("1.0.0", "trial", "confirmed")
    wait_for(lambda: device.status()["shadows"] == {})


@pytest.mark.slow
def test_a_shadow_keeps_within_its_share_of_a_core_and_what_it_missed_is_counted(
    device: Device, server: Server
) -> None:
    stable, other = device.bundle("1.0.0", seed=1), device.bundle("1.1.0", seed=2)
    confirmed(device, "1.0.0", stable)
    settings = group.Settings(shadow_share=1.0, shadow_cpu=0.01)
    device.publish(stable, shadow=other, settings=settings)
    device.sync()
    pid = in_shadow(device, other)
    before = cpu_s(pid)
    with Load(device, clients=4, pause_s=0.0) as load:
        wait_for(lambda: load.ok > 5_000)
    assert load.failed == []
    assert cpu_s(pid) - before < 1.0
    wait_for(lambda: seen(server, other).dropped.get("busy", 0) > 500)


def test_a_shadow_that_hangs_in_an_inference_is_ended_and_told_and_serving_goes_on(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device(inference_s=2.0)
    stable, hanging = device.bundle("1.0.0", seed=1), device.bundle("1.1.0", kind="slow-on-rows")
    confirmed(device, "1.0.0", stable)
    device.publish(stable, shadow=hanging, settings=SETTINGS)
    device.sync()
    pid = in_shadow(device, hanging)
    # For what it would need hours.
    assert device.infer(1, value=models.SLOW_ABOVE + 5e8) == ["1.0.0"]
    wait_for(
        lambda: "worker_hung" in [event.code for event in server.events("shadow")], why=lambda: device.log()[-3000:]
    )
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert device.infer(5) == ["1.0.0"] * 5
    assert device.status()["update"]["state"] == "confirmed"
    # It comes back, and what it is shown now it can do.
    assert in_shadow(device, hanging) != pid


def test_a_shadow_that_cannot_be_proved_is_reported_and_serving_goes_on(device: Device, server: Server) -> None:
    stable, bad = device.bundle("1.0.0", seed=1), device.bundle("1.1.0", seed=2, kind="wrong-golden")
    confirmed(device, "1.0.0", stable)
    # What cannot be fetched is waited for, oftener than a shadow may die.
    device.world["errors"] = {"fetch": ["transient", "unreachable", "no route"]}
    device.publish(stable, shadow=bad, settings=SETTINGS)
    device.sync()
    wait_for(
        lambda: device.log().count("warning shadow model=gas code=unreachable") > 6, why=lambda: device.log()[-3000:]
    )
    device.world["errors"] = {}
    device.save()
    wait_for(lambda: [event.code for event in server.events("shadow")] == ["unreachable", "golden_failed"])
    assert shadow(device)["code"] == "golden_failed"
    assert not shadow(device)["running"]
    assert device.infer(5) == ["1.0.0"] * 5
    assert device.status()["update"]["state"] == "confirmed"


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
