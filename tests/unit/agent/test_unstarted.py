"""What served and does not start any more: what is told of it, and until when."""

from __future__ import annotations

from skerry_agent.errors import Degraded, Rejected
from skerry_agent.slots import Slot
from skerry_agent.unstarted import Unstarted


def test_the_last_start_that_failed_is_told_until_one_does_not() -> None:
    models = {
        name: Slot(digest=letter * 64, version="1.0.0", variant="onnx", standing="confirmed")
        for name, letter in (("gas", "a"), ("hum", "b"))
    }
    found = Unstarted(on_event=lambda *_: None, on_damage=lambda _: None, go_back=lambda *_: False)
    found.failed(models, Degraded("encryption_key_differs", "HTTP 403"))
    assert found.last == dict.fromkeys(models, ("encryption_key_differs", "HTTP 403"))
    found.failed(models, Rejected("runtime_crashed", "signal 8", model="gas"))
    assert found.last == {"gas": ("runtime_crashed", "signal 8"), "hum": ("encryption_key_differs", "HTTP 403")}
    found.started({"gas": models["gas"]})
    assert list(found.last) == ["hum"]
