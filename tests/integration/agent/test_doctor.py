"""``skerry-agent doctor`` names what is wrong in the state folder, and repairs nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.agent.rig import Device, Server


def examine(device: Device, **environment: str) -> dict[str, list[dict[str, Any]]]:
    """Findings by check."""
    command = [sys.executable, "-m", "skerry_agent", "doctor", "--json", "--config", str(device.config)]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )
    body = json.loads(ended.stdout)
    assert ended.returncode == (0 if body["ok"] else 1)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in body["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return found


def verdict(found: dict[str, list[dict[str, Any]]], check: str) -> tuple[str, str]:
    """The worst of a check: of workers and addresses there is a finding each."""
    for finding in found[check]:
        assert finding["advice"] or finding["verdict"] == "ok"
    worst = max(found[check], key=lambda finding: ("ok", "warn", "fail").index(finding["verdict"]))
    return worst["verdict"], worst["detail"]


@pytest.fixture
def stopped(device: Device, server: Server) -> Device:
    """A device that ran 1.0.0 and was stopped."""
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0")
    assert device.stop() == 0
    return device


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def cut_the_model(device: Device) -> None:
    model = next((device.state_dir / "slots").glob("*/model.onnx"))
    model.write_bytes(model.read_bytes()[:-7])


def flip_the_model(device: Device) -> None:
    model = next((device.state_dir / "slots").glob("*/model.onnx"))
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)


def spoil_the_pointers(device: Device) -> None:
    (device.state_dir / "slots" / "pointers.json").write_text('{"schema":1,"mod')


def spoil_the_store(device: Device) -> None:
    path = device.state_dir / "state.db"
    data = bytearray(path.read_bytes())
    data[4096:8192] = os.urandom(4096)
    path.write_bytes(data)


def fill_the_outbox(device: Device) -> None:
    with sqlite3.connect(device.state_dir / "state.db") as database:
        (epoch,) = database.execute("SELECT epoch FROM epochs WHERE current = 1").fetchone()
        database.execute(
            "INSERT INTO outbox (epoch, seq, kind, key, size, inferences, replaces, body) "
            "VALUES (?, 1000000, 'event', '', 62000000, 0, '[]', x'00')",
            (epoch,),
        )
    database.close()


def sign_the_future(device: Device) -> None:
    with sqlite3.connect(device.state_dir / "state.db") as database:
        database.execute("INSERT OR REPLACE INTO state (key, value) VALUES ('lower_bound_s', '4102444800.0')")
    database.close()


def leave_a_damaged_store(device: Device) -> None:
    (device.state_dir / "state.db.damaged-1700000000").write_bytes(bytes(4_200_000))


def open_the_folder(device: Device) -> None:
    device.state_dir.chmod(0o755)


def forget_the_root(device: Device) -> None:
    (device.state_dir / "identity" / "root.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("harm", "check", "wanted", "says"),
    [
        (cut_the_model, "slots", "fail", "not whole"),
        (flip_the_model, "runtime", "fail", "model.onnx"),
        (spoil_the_pointers, "slots", "fail", "cannot be checked"),
        (spoil_the_store, "store", "fail", "state.db"),
        (leave_a_damaged_store, "damaged store", "warn", "state.db.damaged-1700000000 was moved aside, 4.2 MB"),
        (fill_the_outbox, "outbox", "fail", "97%"),
        (sign_the_future, "clock", "fail", "behind"),
        (open_the_folder, "state folder", "warn", "0755"),
        (forget_the_root, "root of trust", "fail", "root.json"),
    ],
)
def test_each_damage_is_named_with_advice_and_nothing_is_changed(
    stopped: Device, harm: Callable[[Device], None], check: str, wanted: str, says: str
) -> None:
    harm(stopped)
    before = snapshot(stopped.state_dir)
    found = examine(stopped)
    for finding in found[check]:
        assert finding["verdict"] == wanted, found
        assert says in finding["detail"], finding
    assert verdict(found, "agent")[0] == "fail"
    assert snapshot(stopped.state_dir) == before


def test_a_crashing_runtime_kills_its_child_and_not_the_examination(stopped: Device) -> None:
    # The interpreter is built in a process of its own: here it cannot even start numpy.
    folder = stopped.folder / "broken"
    (folder / "numpy").mkdir(parents=True)
    (folder / "numpy" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    found = examine(stopped, PYTHONPATH=os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    assert verdict(found, "runtime") == ("fail", "gas 1.0.0: died of signal 11: ended with -11")
    assert verdict(found, "slots")[0] == "ok"


def test_a_device_that_was_never_enrolled_is_told_how(device: Device) -> None:
    (device.state_dir / "identity" / "enrolled.json").unlink()
    found = examine(device)
    assert verdict(found, "identity")[0] == "fail"
    assert "enrol" in found["identity"][0]["advice"]
    assert "server" not in found
    assert verdict(found, "store") == ("ok", "not made yet: the agent has never run")


def test_a_faulty_configuration_is_the_only_finding_and_names_every_fault(device: Device) -> None:
    device.config.write_text('state_dir = "relative"\n[serving]\nsocket = "x"\nspeed = 1\n')
    found = examine(device)
    assert set(found) == {"configuration"}
    detail = verdict(found, "configuration")[1]
    assert all(word in detail for word in ("state_dir", "serving.socket", "serving.speed"))


def test_while_the_agent_runs_it_asks_it_and_its_worker(device: Device, server: Server) -> None:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0")
    device.state_dir.chmod(0o700)
    found = examine(device)
    for check in ("agent", "worker", "slots", "runtime", "store", "outbox", "state folder"):
        assert verdict(found, check)[0] == "ok", found[check]
    # The identity of these tests is made up: all that hangs on it says so, and the agent has not noticed.
    assert verdict(found, "identity")[0] == "fail"
    assert device.status()["link"]["connected"]


def test_an_address_that_another_program_has_is_named(stopped: Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        environment = {"SKERRY_AGENT_SERVING_PORT": str(port)}
        told, detail = verdict(examine(stopped, **environment), "address")
        assert told == "fail"
        assert f"127.0.0.1:{port}: Address already in use" in detail
        assert f"process {os.getpid()}, listens there" in detail
    assert verdict(examine(stopped, **environment), "address") == ("ok", f"127.0.0.1:{port} is free")


@pytest.mark.slow
def test_an_agent_that_hangs_is_not_taken_for_one_that_does_not_run(stopped: Device) -> None:
    stopped.start()
    assert stopped.process is not None
    os.kill(stopped.process.pid, signal.SIGSTOP)
    try:
        told, detail = verdict(examine(stopped), "agent")
        assert told == "fail"
        assert detail.startswith("runs, and does not answer")
        begun = time.monotonic()
        command = [sys.executable, "-m", "skerry_agent", "status", "--config", str(stopped.config)]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert time.monotonic() - begun < 19.0, "it asks once"
        assert asked.returncode == 1
        assert "agent_silent" in asked.stderr
        assert "restart it" in asked.stderr
    finally:
        os.kill(stopped.process.pid, signal.SIGCONT)


def test_a_store_that_another_program_holds_is_named_with_it(stopped: Device) -> None:
    stopped.start()
    path = stopped.state_dir / "state.db"
    program = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        told, detail = verdict(examine(stopped), "store")
        holder.terminate()
    assert told == "fail"
    assert f"process {holder.pid} has locked it" in detail
    assert verdict(examine(stopped), "store")[0] == "ok"


def test_a_model_that_rotted_is_no_fault_of_the_runtime(stopped: Device) -> None:
    cut_the_model(stopped)
    (finding,) = [f for f in examine(stopped)["runtime"] if f["verdict"] == "fail"]
    assert "size_mismatch" in finding["detail"] or "hash_mismatch" in finding["detail"]
    assert finding["advice"].startswith("skerry-agent sync")
