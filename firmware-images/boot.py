"""Boots the image under qemu beside a real server: the device enrols, takes a model, serves, hangs, comes back, is switched off.

Run it by the Python of ``make setup``: ``.venv/bin/python firmware-images/boot.py``. Wants what ``make image`` made, and qemu.
Everything it makes is in ``build/boot``; the image itself is not written to. The server listens on loopback, which the guest's
user network shows as 10.0.2.2. Ends with 0 when every step came to pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from skerry_cli import catalog, publishing
from skerry_cli.client import Api
from skerry_cli.demo import data, models
from skerry_cli.demo.fleet import GROUP, Fleet
from skerry_cli.demo.processes import Processes
from skerry_cli.demo.reckoning import server_counts
from skerry_cli.enrolling import complete_token
from skerry_cli.errors import Failed
from skerry_cli.profile import Profile
from skerry_contract import enrolment

HERE = Path(__file__).parent
DEVICE = "device-1"
HOST = "10.0.2.2"
"""This machine, as the guest sees it."""
STEP_S = 900.0
"""Without KVM a guest is slow, and more so on a machine that has other things to do."""
_SERVICE = """
[Unit]
Description=Rig: an application and somebody who looks
After=network.target
[Service]
ExecStart=/usr/lib/skerry-agent/bin/python3 -I /opt/rig/rig.py
StandardError=journal+console
"""


def program(name: str) -> str:
    """Where a program is; Debian keeps some where only root looks."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        raise SystemExit(f"{name} is not installed (on Debian: apt install qemu-system-x86 e2fsprogs)")
    return found


class Story:
    """Says what happens, with the time since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f}s  {text}", flush=True)


class Guest:
    """The machine. ``folder``: for its copy of the image, its console, its second serial port."""

    def __init__(self, folder: Path, image: Path, processes: Processes) -> None:
        self._folder = folder
        self._processes = processes
        self.disk = folder / "disk.ext4"
        subprocess.run(["cp", "--sparse=always", str(image), str(self.disk)], check=True)
        self._boot = {name: image.with_name(f"{name}-amd64") for name in ("vmlinuz", "initrd")}

    def add_rig(self, rows: list[list[float]], runtimes: str) -> None:
        """Puts the application into the copy, without mounting it, and the runtimes that the agent may use."""
        files = {"rig.py": (HERE / "rig.py").read_text(), "rows.json": json.dumps(rows), "rig.service": _SERVICE}
        commands = ["mkdir /opt/rig"]
        if runtimes:
            drop_in = self._folder / "runtimes.conf"
            drop_in.write_text(f"[Service]\nEnvironment=SKERRY_AGENT_DEVICE_RUNTIMES={runtimes}\n")
            place = "/etc/systemd/system/skerry-agent.service.d"
            commands += [f"mkdir {place}", f"write {drop_in} {place}/runtimes.conf"]
        for name, text in files.items():
            (self._folder / name).write_text(text)
            place = "/etc/systemd/system" if name.endswith(".service") else "/opt/rig"
            commands.append(f"write {self._folder / name} {place}/{name}")
        commands.append("symlink /etc/systemd/system/multi-user.target.wants/rig.service ../rig.service")
        script = self._folder / "debugfs"
        script.write_text("\n".join(commands) + "\n")
        subprocess.run([program("debugfs"), "-w", "-f", str(script), str(self.disk)], check=True, capture_output=True)

    def start(self, token: str, *, accelerator: str, memory_mb: int, processors: int) -> None:
        """Switches it on. The token is read from a file: nobody sees it among the programs' arguments."""
        port, secret = self._folder / "port", self._folder / "token"
        secret.touch(mode=0o600)
        secret.write_text(token)
        self._processes.start(
            "qemu",
            [
                *(program("qemu-system-x86_64"), "-accel", accelerator, "-cpu", "max", "-m", str(memory_mb), "-smp", str(processors)),
                *("-nodefaults", "-no-reboot", "-display", "none"),
                *("-kernel", str(self._boot["vmlinuz"]), "-initrd", str(self._boot["initrd"])),
                *("-append", "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=yes"),
                *("-drive", f"file={self.disk},if=virtio,format=raw"),
                *("-nic", "user,model=virtio-net-pci"),
                *("-device", "virtio-rng-pci"),
                *("-serial", f"file:{self._folder / 'console.log'}"),
                *("-chardev", f"socket,id=rig,path={port},server=on,wait=off", "-serial", "chardev:rig"),
                *("-fw_cfg", f"name=opt/io.systemd.credentials/skerry.enrolment-token,file={secret}"),
            ],
        )  # fmt: skip
        deadline = time.monotonic() + 30
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while True:
            try:
                self._socket.connect(os.fspath(port))
                break
            except OSError as error:
                if any(name.startswith("qemu ") for name in self._processes.died()) or time.monotonic() > deadline:
                    said = self._processes.tail("qemu") or error
                    raise Failed(f"qemu does not run with the accelerator {accelerator}: {said}") from None
                time.sleep(0.1)
        self._lines = self._socket.makefile("rwb")

    def hear(self, step: str, *, show: bool = True) -> dict[str, Any]:
        """Reads what the rig says until it comes to a step."""
        self._socket.settimeout(STEP_S)
        ended = "the guest ended"
        try:
            for raw in self._lines:
                line = raw.decode(errors="replace").strip("\r\n")
                if line.startswith("#"):
                    if show:
                        print(f"         | {line[2:]}", flush=True)
                elif line.startswith("{"):
                    found = dict(json.loads(line))
                    assert found["step"] == step, found
                    return found
        except OSError as error:
            ended = f"the guest ended or hangs ({error})"
        raise Failed(
            f"{ended} before it came to: {step}; see {self._folder / 'console.log'}. {self._processes.tail('qemu')}".rstrip()
        )

    def go_on(self) -> None:
        """Lets the rig do its next step."""
        self._lines.write(b"go\n")
        self._lines.flush()

    def rest(self) -> None:
        """Shows what it says until it is off."""
        for raw in self._lines:
            print(f"         | {raw.decode(errors='replace').strip()[2:]}", flush=True)


def start_server(fleet: Fleet) -> None:
    """A server that the guest knows as ``HOST``, and we as loopback."""
    os.environ["SKERRY_SERVER_SERVER_PUBLIC_HOST"] = HOST
    os.environ["SKERRY_SERVER_SERVER_PUBLIC_NAMES"] = "127.0.0.1"
    told = fleet.start_server()
    ours = told.url.replace(HOST, "127.0.0.1")
    fleet.server = dataclasses.replace(told, url=ours)
    token = (told.data / "admin.token").read_text().strip()
    fleet.api = Api(Profile(server=ours, token=token, ca=told.data / "ca" / "ca.pem"))
    fleet.hold_ceremony(dt.datetime.now(dt.UTC))


def token_for_guest(fleet: Fleet) -> str:
    """A one-time token whose address is the one that the guest reaches."""
    wish = {"device_id": DEVICE, "group": GROUP, "expires_s": 3600}
    there = enrolment.parse(complete_token(fleet.api, fleet.ceremony.root_sha256, wish))
    return enrolment.build(
        enrolment.Enrolment(
            server_url=fleet.server.url.replace("127.0.0.1", HOST),
            token=there.token,
            ca_sha256=there.ca_sha256,
            root_sha256=there.root_sha256,
        )
    )


def publish(fleet: Fleet) -> models.Made:
    """A real model, approved and rolled out to everyone."""
    made = models.make_bundle(fleet.folder / "1.0.0", version="1.0.0", batches=(1,), created="2026-01-01T00:00:00Z")
    pushed = publishing.push(fleet.api, made.bundle)
    assert pushed.state == "validated", pushed
    addition = catalog.Addition(model=models.MODEL, version="1.0.0", digest=made.bundle.digest, submitter="rig")
    now = dt.datetime.now(dt.UTC)
    fleet.approver.change(catalog.Change(add=(addition,)), now=now, folder=made.bundle.folder)
    body = {
        "id": "first", "group": GROUP, "model": models.MODEL, "candidate": made.bundle.digest,
        "stages": [{"share": 1.0, "min_inferences": 100, "max_seconds": 3600}],
        "gates": {"max_error_rate": 0.5, "latency_p95_ms": 60000.0},
    }  # fmt: skip
    fleet.api.post("/api/v1/rollouts", body)
    return made


def devices(fleet: Fleet) -> str:
    """What the operator's tool shows."""
    environment = {
        **os.environ,
        "SKERRY_SERVER": fleet.server.url,
        "SKERRY_CA": str(fleet.server.data / "ca" / "ca.pem"),
        "SKERRY_TOKEN": (fleet.server.data / "admin.token").read_text().strip(),
    }
    command = [sys.executable, "-m", "skerry_cli", "device", "list"]
    shown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return "\n".join(f"         | {line}" for line in ("$ skerry device list", *shown.rstrip().splitlines()))


def run(options: argparse.Namespace, processes: Processes, story: Story) -> None:
    """The whole story. Raises on the first step that does not come to pass."""
    fleet = Fleet(options.folder, processes, seed=1)
    start_server(fleet)
    publish(fleet)
    story.say(f"Server, ceremony, model and rollout are there; the server listens on {fleet.server.url}.")
    guest = Guest(options.folder, options.image, processes)
    guest.add_rig([[float(v) for v in row] for row in data.load((1,)).x[:50]], options.runtimes)
    guest.start(
        token_for_guest(fleet),
        accelerator=options.accelerator,
        memory_mb=options.memory_mb,
        processors=options.processors,
    )
    story.say(f"Switched on: {options.accelerator}, {options.memory_mb} MB, {options.processors} processors.")

    for step in ("agent up", "model ready"):
        found = guest.hear(step)
        story.say(f"Guest: {step}, {found['uptime_s']:.1f} s after its kernel began.")
    found = guest.hear("asked")
    story.say(
        f"Guest: {found['asked']} inferences of {found['version']}, {found['failed']} failed; p50 {found['p50_ms']} ms, "
        f"p95 {found['p95_ms']} ms."
    )
    assert (found["failed"], found["version"]) == (0, "1.0.0")
    found = guest.hear("looked")
    story.say(f"Guest: the agent's unit has {found['memory_mb']} MB.")
    for process in found["processes"]:
        story.say(f"    {process['rss_mb']:6.1f} MB resident: {process['command']}")

    def confirmed() -> bool:
        item = fleet.listed().get(DEVICE, {})
        return bool(item.get("online")) and fleet.running(item) == ("1.0.0", "confirmed")

    fleet.wait("the server to hear that the model is confirmed", confirmed, STEP_S)
    story.say("The server shows it online:")
    print(devices(fleet))

    guest.go_on()
    found = guest.hear("watchdog")
    story.say(
        f"Guest: the supervisor was stopped (SIGSTOP); the watchdog killed it after {found['killed_after_s']} s. Meanwhile the worker "
        f"answered {found['asked'] - found['failed']} of {found['asked']} inferences."
    )
    found = guest.hear("back")
    story.say(
        f"Guest: back after {found['after_s']} s with {found['version']}, restarts {found['restarts']}; "
        f"{found['asked']} inferences asked, {found['failed']} failed in all."
    )
    assert (found["restarts"], found["version"]) == (1, "1.0.0")

    def counted() -> int:
        items, _ = server_counts(fleet)
        return sum(int(row["ok"]) for row in items if row["device"] == DEVICE)

    answered = found["asked"] - found["failed"]
    fleet.wait("the server to have counted every answer", lambda: counted() == answered, STEP_S)
    story.say(f"The server counted {counted()} inferences, the application had {answered} answers.")

    guest.go_on()
    guest.rest()
    assert processes.wait("qemu", STEP_S) == 0
    story.say("Switched off.")


def main() -> int:
    """Runs the story and ends every process."""
    parser = argparse.ArgumentParser(description="Boots the image beside a real server.")
    parser.add_argument("--image", type=Path, default=Path("build/image/skerry-amd64.ext4"))
    parser.add_argument("--folder", type=Path, default=Path("build/boot"), help="made anew")
    parser.add_argument("--accelerator", default="tcg", help="kvm where it works")
    parser.add_argument(
        "--runtimes", default="", help="onnx, tflite, or both: which the agent may use; empty: as the image says"
    )
    parser.add_argument("--memory-mb", type=int, default=1024)
    parser.add_argument("--processors", type=int, default=2)
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    shutil.rmtree(options.folder, ignore_errors=True)
    processes = Processes(options.folder, leashed=True)
    story = Story()
    try:
        run(options, processes, story)
    except Failed as error:
        print(f"boot.py: {error}", file=sys.stderr)
        return 1
    finally:
        processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
