"""Cuts in the errands that make and renew a device's identity: what is left is an identity, or none, and the errand may run again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from skerry_agent import config as configuration
from skerry_agent.courier.__main__ import run
from skerry_agent.errors import AgentError, Degraded
from skerry_agent.identity import identity

from tests.crash.disk import WAYS, Disk, fingerprint, lay_out
from tests.crash.world import GROUP, ROOT, recorder, tree_of
from tests.integration.tuf.conftest import Device as Courier
from tests.integration.tuf.conftest import Fleet

KEYS = ("device.key", "encryption.key")
NAMES = ("root.json", "device.key", "encryption.key", "fleet-ca.pem", "device.pem", "enrolled.json")


class Errand:
    """One errand of a courier, recorded. ``verb``: ``enrol`` or ``renew``."""

    def __init__(self, folder: Path, verb: str) -> None:
        self.folder = folder
        self.verb = verb
        self.fleet = Fleet(folder / "fleet")
        try:
            self.fleet.repository.publish_group(GROUP, self.fleet.document(name=GROUP))
            self.state_dir = folder / "device"
            self.courier = Courier(self.fleet, self.state_dir)
            self.fields: dict[str, Any] = {}
            if verb == "enrol":
                self.fields["token"] = self.fleet.token()
                self.state_dir.mkdir()
            else:
                self.courier.enrol()
            self.before = dict(tree_of(self.state_dir))
            self.disk = Disk(self.state_dir)
            self.disk.take(self._recorded())
            self.after = dict(tree_of(self.state_dir))
        except BaseException:
            self.fleet.site.close()
            raise

    def _recorded(self) -> bytes:
        record = self.folder / "record"
        environment = {
            "LD_PRELOAD": str(recorder(self.folder)), "SKERRY_BELOW": str(self.state_dir), "SKERRY_RECORD": str(record),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "skerry_agent.courier", self.verb], input=self.courier.request(**self.fields),
            capture_output=True, timeout=60, cwd=ROOT, env={**os.environ, **environment},
        )  # fmt: skip
        assert "ok" in json.loads(done.stdout.splitlines()[-1]), (done.stdout, done.stderr)
        return record.read_bytes()

    def examine(self, every: int = 1) -> tuple[int, list[str]]:
        """(starts, faults) of points in every way; of what is left, each ``every``-th that differs from the others."""
        seen: set[str] = set()
        starts, faults = 0, []
        for point in range(len(self.disk.operations) + 1):
            for way in WAYS:
                files = self.disk.files(self.disk.left(point, way))
                if fingerprint(files) in seen:
                    continue
                seen.add(fingerprint(files))
                if len(seen) % every:
                    continue
                starts += 1
                before = self.disk.operations[point].told if point < len(self.disk.operations) else "the end"
                faults += [f"point {point} (before: {before}), {way}: {fault}" for fault in self._examine(point, files)]
        return starts, faults

    def _examine(self, point: int, files: dict[str, bytes | str | None]) -> list[str]:
        state_dir = self.folder / "cut" / "device"
        lay_out(files, state_dir)
        device = Courier(self.fleet, state_dir)
        strict = self.disk.files(self.disk.left(point, "strict"))
        config = self.folder / "cut" / "agent.toml"
        config.write_text(f'state_dir = "{state_dir}"\n')
        faults = []
        try:
            try:
                identity(configuration.load(config, {}))
            except Degraded as error:
                if error.code != "not_enrolled" or self.verb == "renew" or point == len(self.disk.operations):
                    return [f"no identity: {error}"]
            held = {name: files.get(f"identity/{name}") for name in KEYS}
            if self.verb == "renew":
                pem = files["identity/device.pem"]
                if pem not in (self.before["identity/device.pem"], self.after["identity/device.pem"]):
                    faults.append("neither the old certificate nor the new one")
            run(self.verb, device.request(**self.fields))
            run("sync", device.request(group=str(GROUP)))
            for name in KEYS:
                if self.verb == "renew" or f"identity/{name}" in strict:
                    if (state_dir / "identity" / name).read_bytes() != held[name]:
                        faults.append(f"another {name} than before")
            more = {path.name for path in (state_dir / "identity").iterdir()} - set(NAMES)
            if more:
                faults.append(f"left behind: {sorted(more)}")
        except AgentError as error:
            faults.append(f"the errand cannot run again: {error.code}: {error.detail}")
        finally:
            shutil.rmtree(self.folder / "cut")
        return faults

    def close(self) -> None:
        """Ends the server."""
        self.fleet.site.close()
