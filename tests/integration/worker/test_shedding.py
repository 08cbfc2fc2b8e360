"""A real worker that is asked for more than it can answer."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from pathlib import Path

import pytest
from skerry_agent import workerwire as ww

from tests import models
from tests.integration.worker.rig import Rig, Worker

INFER = "/v2/models/gas/infer"


def body() -> bytes:
    x = models.rows(1)[0]
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def connections(rig: Rig, n: int) -> list[http.client.HTTPConnection]:
    """Keep-alive connections that the worker has accepted."""
    found = [http.client.HTTPConnection("127.0.0.1", rig.port, timeout=60) for _ in range(n)]
    for one in found:
        one.request("GET", "/v2/health/live")
        one.getresponse().read()
    return found


def burst(worker: Worker, asking: list[http.client.HTTPConnection]) -> list[http.client.HTTPResponse]:
    """One request on each, all there before the worker looks."""
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        for one in asking:
            one.request("POST", INFER, body())
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    found = []
    for one in asking:
        response = one.getresponse()
        response.read()
        found.append(response)
    return found


@pytest.mark.parametrize("uvloop", [True, False])
def test_of_those_that_come_together_a_quick_model_answers_max_inflight_and_tells_the_rest_when(
    tmp_path: Path, bundle: Path, uvloop: bool
) -> None:
    with Rig(tmp_path) as rig:
        if not uvloop:
            rig.environment["SKERRY_NO_UVLOOP"] = "1"
        worker = rig.start(rig.served(bundle), max_inflight=8)
        asking = connections(rig, 64)
        answered = shed = 0
        for _ in range(3):
            found = burst(worker, asking)
            statuses = [response.status for response in found]
            answered, shed = answered + statuses.count(200), shed + statuses.count(503)
            # All in one turn of the loop, or nearly: a few may have been seen before the others were there.
            assert 8 <= statuses.count(200) <= 16
            for response in found:
                if response.status == 503:
                    assert response.headers["Retry-After"] == "1"
                    assert 1 <= int(response.headers["Skerry-Retry-After-Ms"]) < 1000
            time.sleep(0.15)
        assert answered + shed == 192
        # At their usual pace all of them are answered.
        for one in asking:
            one.request("POST", INFER, body())
            response = one.getresponse()
            response.read()
            assert response.status == 200
            one.close()
        rig.flush(worker)
        assert (rig.total().ok, rig.total().shed) == (answered + 64, shed)


def test_a_slow_model_takes_no_more_than_may_wait_and_tells_the_rest_how_long_that_is(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some 40 ms: what comes together is looked at long before the first of it is answered.
    monkeypatch.setattr(models, "SLOW_TURNS", 40_000)
    models.build_bundle(tmp_path / "b", kind="slow")
    worker = rig.start(rig.served(tmp_path / "b"), max_wait_s=0.2)
    (proved,) = worker.wait_for(ww.Ready).models
    one_ms = proved.infer_us / 1e3
    fit = 200 / one_ms
    asking = connections(rig, 60)
    found = burst(worker, asking)
    accepted = sum(response.status == 200 for response in found)
    # While they came in, some were done.
    assert fit * 0.5 <= accepted <= 3 * fit + 2
    told = [int(r.headers["Skerry-Retry-After-Ms"]) for r in found if r.status == 503]
    assert len(told) == 60 - accepted > 0
    # The last that was accepted: as long as one took at load, or longer by what the first of this burst took on a busy machine.
    assert all(200 <= ms <= 200 + 2 * one_ms + 1 for ms in told)
    # Who comes back then is answered.
    end = time.monotonic() + 30
    while True:
        asking[0].request("POST", INFER, body())
        response = asking[0].getresponse()
        response.read()
        if response.status == 200:
            break
        assert time.monotonic() < end
        time.sleep(int(response.headers["Skerry-Retry-After-Ms"]) / 1e3)
    for one in asking:
        one.close()


def test_a_connection_that_will_not_wait_is_refused_ten_times_a_second_and_one_that_is_served_never_waits(
    rig: Rig, bundle: Path
) -> None:
    worker = rig.start(rig.served(bundle), access=ww.Access(rate=1e-3, burst=3))
    (impatient,) = connections(rig, 1)
    statuses, took = [], []
    for _ in range(8):
        begin = time.monotonic()
        impatient.request("POST", INFER, body())
        response = impatient.getresponse()
        response.read()
        statuses.append(response.status)
        took.append(time.monotonic() - begin)
    assert statuses == [200] * 3 + [429] * 5
    # The first at once, the four others 0.1 s apart each: from when the first was asked for, by a clock that no busy machine makes run ahead.
    assert sum(took[3:]) > 0.4, took
    # A drain does not lose what is held back.
    impatient.request("POST", INFER, body())
    new = rig.swap(worker, rig.served(bundle))
    assert impatient.getresponse().status == 429
    impatient.close()
    rig.stop(new)
    assert (rig.total().ok, rig.total().shed) == (3, 6)
