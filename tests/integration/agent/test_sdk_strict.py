"""An application that asks wrongly is told what was wanted, at no cost of its bundle; with an agent that hangs it keeps few windows."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest
from skerry_agent import sdk
from skerry_agent.sdk.ledger import MOST_SENT, MOST_WAITING

from tests.integration.agent.rig import Device, Server, wait_for
from tests.integration.agent.test_sdk import ROW, confirm, counted, opened


def test_what_a_programmer_got_wrong_is_named_and_counts_as_invalid_not_as_the_bundles_failure(
    device: Device, server: Server
) -> None:
    confirm(device, "1.0.0")
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (None, {}, "inputs: wanted a mapping"),
        ([ROW], {}, "inputs: wanted a mapping"),
        ({1: ROW}, {}, "1: wanted one of x"),
        ({"x": None}, {}, "x: "),
        ({"x": ROW}, {"age_ms": "5"}, "age_ms: wanted a number"),
        ({"x": ROW}, {"age_ms": True}, "age_ms: wanted a number"),
        ({"x": ROW}, {"age_ms": float("nan")}, "age_ms: wanted milliseconds"),
        ({"x": ROW}, {"stream": [1]}, "stream: wanted a number or a text"),
        ({"x": ROW}, {"stream": True}, "stream: wanted a number or a text"),
        ({"x": ROW}, {"stream": 1, "begin": "yes"}, "begin: wanted True or False"),
        ({"x": ROW}, {"explain": "yes"}, "explain: wanted true or false"),
        ({"x": ROW}, {"traceparent": None}, "traceparent: wanted a text"),
    ]
    with opened(device) as model:
        for inputs, options, says in wrong:
            with pytest.raises(sdk.BadInput, match=says):
                model.infer(inputs, **options)
        ident = model.infer({"x": ROW}, age_ms=np.float32(5.0)).prediction_id  # type: ignore[arg-type]
        labels: list[tuple[Any, Any, Any, str]] = [
            (ident, 1.5, None, "label: wanted a class by name or index, got float"),
            (ident, 1.0, None, "label: wanted a class"),
            (ident, True, None, "label: wanted a class"),
            (ident, None, None, "label: wanted a class"),
            (None, 1, None, "prediction_id: wanted a text"),
            (ident, 1, "0", "row: wanted a whole number"),
            (ident, 1, False, "row: wanted a whole number"),
        ]
        for prediction, label, row, says in labels:
            with pytest.raises(sdk.Rejected, match=says) as found:
                model.feedback(prediction, label, row=row)
            assert found.value.code == "invalid_label"
        assert model.feedback(ident, np.int64(1)) == "matched"  # type: ignore[arg-type]
    counted(server, device)
    counts = [window.counts for window in server.windows()]
    assert sum(c.invalid for c in counts) == len(wrong)
    assert sum(c.failed for c in counts) == 0
    assert sum(window.labels.matched for window in server.windows() if window.labels is not None) == 1


def test_windows_of_an_application_whose_agent_hangs_are_bounded_and_all_arrive_when_it_goes_on(
    device: Device, server: Server
) -> None:
    confirm(device, "1.0.0")
    assert device.process is not None
    with opened(device) as model:
        model.infer({"x": ROW})
        assert model.flush()
        os.kill(device.process.pid, signal.SIGSTOP)
        try:
            made, files = 5 * MOST_WAITING, model._connection.ledger.files
            for _ in range(made):
                model.infer({"x": ROW})
                model.flush(0.0)

            def sorted_in() -> bool:
                return sum(one.message.inferences for f in files.values() for one in f.waiting) == made  # type: ignore[union-attr]

            wait_for(sorted_in, why="windows sorted in")
            assert model.status()["connected"], "it hangs, and has not gone"
            for file in files.values():
                assert len(file.waiting) <= MOST_WAITING
                assert sum(one.sent for one in file.waiting) <= MOST_SENT
            time.sleep(0.2)
        finally:
            os.kill(device.process.pid, signal.SIGCONT)
        wait_for(model.flush, why="the windows")
    assert counted(server, device) == made + 1 + 25
    assert device.status()["outbox"]["lost"] == {}
