"""A running server that ends, or is killed, while it makes a delta. What it makes else, and for whom: tests/system/test_deltas.py."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from skerry_runtime import delta

from tests.rig_server import DeviceRig, Operator, ServerRig

OLD = os.urandom(60_000)
NEW = OLD[:20_000] + b"other" * 40 + OLD[20_200:]
KEY = (hashlib.sha256(OLD).hexdigest(), hashlib.sha256(NEW).hexdigest())


class Site:
    """A server whose one device reports to run 1.0.0, and that has 2.0.0 from now on."""

    def __init__(self, folder: Path) -> None:
        self.server = ServerRig(folder / "server", {"DELTAS_LOOK_S": "0.1"}).start()
        self.server.good("PUT", "/api/v1/groups/press", {})
        self.operator = Operator(self.server, folder / "operator")
        self.operator.install_trust()
        digest = self.operator.publish("gas", "1.0.0", further={"weights.bin": OLD})
        self.server.good("PUT", "/api/v1/groups/press/models/gas", {"stable": digest})
        self.device = DeviceRig(self.server, "d-1", folder)
        self.device.enrol()
        self.device.connect()
        running = {"digest": digest, "version": "1.0.0", "state": "confirmed", "variant": "onnx-fp32"}
        self.device.report({"gas": running})
        self.server.wait("the report", lambda: self.server.good("GET", "/api/v1/devices/d-1")["running"])

    def approve_next(self) -> None:
        self.operator.publish("gas", "2.0.0", further={"weights.bin": NEW})

    def listed(self) -> list[dict[str, Any]]:
        return list(self.server.good("GET", "/api/v1/deltas?model=gas")["items"])

    def ready(self) -> Any:
        return next((row for row in self.listed() if (row["path"], row["state"]) == ("weights.bin", "ready")), None)

    def served(self) -> list[Path]:
        return [path for path in (self.server.data / "repository" / "deltas").rglob("*") if path.is_file()]

    def children(self) -> list[int]:
        """Processes that make a delta for this server."""
        mine = str(self.server.data / "deltas" / "patch").encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mine in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def close(self) -> None:
        self.device.disconnect()
        self.server.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    yield found
    found.close()


def patched(patch: bytes, folder: Path) -> bytes:
    (folder / "old").write_bytes(OLD)
    (folder / "patch").write_bytes(patch)
    delta.apply(folder / "old", folder / "patch", folder / "new", sha256=KEY[1], size=len(NEW))
    return (folder / "new").read_bytes()


def test_a_server_that_ends_while_it_makes_one_serves_no_half_and_makes_it_after_its_next_start(
    site: Site, tmp_path: Path
) -> None:
    site.approve_next()
    for end in (lambda: site.server.stop(timeout_s=30), site.server.kill):
        site.server.wait("the child", site.children, 60)
        end()
        deadline = time.monotonic() + 10
        while site.children():
            assert time.monotonic() < deadline, "the child outlived its server"
            time.sleep(0.02)
        # It may have been done just then. What is there is whole in any case.
        assert all(patched(path.read_bytes(), tmp_path) == NEW for path in site.served())
        for path in site.served():
            path.unlink()
        site.server.start()
    row = site.server.wait("the delta", site.ready, 60)
    (file,) = site.served()
    assert file.stat().st_size == row["bytes"]
    assert row["attempts"] <= 3
    assert list((site.server.data / "deltas").iterdir()) == []
