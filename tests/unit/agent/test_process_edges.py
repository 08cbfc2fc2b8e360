"""What the supervisor touches: couriers, control socket, uploads, service manager, command line, its own imports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from skerry_agent import cli, scraps
from skerry_agent.clock import Clock
from skerry_agent.control import Answer, ControlServer, ask
from skerry_agent.errand import Errands
from skerry_agent.errors import Degraded, Rejected, Transient
from skerry_agent.notify import Notify
from skerry_agent.upload import Upload
from skerry_contract import window as w
from skerry_contract import wire

AT = w.Instant("b" * 32, 1, 2, True)


# --- imports ---------------------------------------------------------------------------------------------------------


def test_the_supervisor_loads_nothing_heavy() -> None:
    script = (
        "import sys, skerry_agent.supervisor, skerry_agent.cli\n"
        "print([n for n in ('numpy','tuf','cryptography','onnxruntime','skerry_runtime','securesystemslib') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_command_line_does_not_load_the_supervisor_to_ask() -> None:
    script = "import sys, skerry_agent.cli; print('paho' in sys.modules, 'sqlite3' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False False"


# --- couriers --------------------------------------------------------------------------------------------------------


def courier(script: str, *, timeout_s: float = 60.0, seen: list[Any] | None = None) -> dict[str, Any]:
    errands = Errands((sys.executable, "-c", script))
    collect = seen.append if seen is not None else None
    return asyncio.run(errands.run("sync", {"a": 1}, timeout_s=timeout_s, on_progress=collect))


def test_a_courier_gets_the_verb_and_the_request_and_its_answer_comes_back() -> None:
    seen: list[Any] = []
    script = (
        "import json, sys\nprint(json.dumps({'progress': {'n': 1}}))\nprint('noise')\n"
        "print(json.dumps({'ok': {'verb': sys.argv[1], 'got': json.load(sys.stdin)}}))"
    )
    assert courier(script, seen=seen) == {"verb": "sync", "got": {"a": 1}}
    assert seen == [{"n": 1}]


@pytest.mark.parametrize("hears", [True, False])
def test_a_courier_that_is_not_wanted_any_more_is_ended_in_order_or_at_last_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hears: bool
) -> None:
    monkeypatch.setattr("skerry_agent.errand._GRACE_S", 30.0 if hears else 0.1)
    put_right = tmp_path / "put-right"
    script = (
        "import json, os, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, {'lambda *_: sys.exit(1)' if hears else 'signal.SIG_IGN'})\n"
        "try:\n"
        "    print(json.dumps({'progress': {'pid': os.getpid()}}), flush=True)\n"
        f"    time.sleep(60)\nfinally: open({str(put_right)!r}, 'w')\n"
    )
    pids: list[int] = []

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None

        def take(said: dict[str, Any]) -> None:
            pids.append(said["pid"])
            task.cancel()

        await Errands((sys.executable, "-c", script)).run("sync", {}, timeout_s=60.0, on_progress=take)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert put_right.exists() is hears
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("transient", Transient), ("rejected", Rejected), ("degraded", Degraded), ("strange", Transient)],
)
def test_what_a_courier_reports_is_raised_as_its_kind(kind: str, wanted: type[Exception]) -> None:
    line = json.dumps({"error": {"kind": kind, "code": "c", "detail": "d"}})
    with pytest.raises(wanted, match="c: d"):
        courier(f"print('''{line}''')")


def test_a_courier_that_dies_is_transient_and_its_last_words_are_kept() -> None:
    with pytest.raises(Transient, match="ValueError: no such thing") as caught:
        courier("raise ValueError('no such thing')")
    assert caught.value.code == "courier_crashed"


def test_a_courier_that_hangs_is_killed() -> None:
    with pytest.raises(Transient) as caught:
        courier("import time; time.sleep(600)", timeout_s=0.3)
    assert caught.value.code == "timeout"


@pytest.mark.parametrize(("verb", "field"), [("unseal", "folder"), ("fetch", "opened")])
def test_what_a_killed_courier_had_in_the_clear_goes_with_it_and_what_a_living_one_has_stays(
    tmp_path: Path, verb: str, field: str
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir(mode=0o700)
    names = f".delta-{'ab' * 32}", f".{'cd' * 32}.new"
    (memory / ("ef" * 32)).mkdir()
    script = f"""
import pathlib, time
from skerry_agent import scraps
with scraps.held(pathlib.Path({str(memory)!r}), {names[0]!r}) as place:
    (place / "target").write_bytes(b"weights")
    time.sleep(600)
"""
    errands = Errands((sys.executable, "-c", script))
    with scraps.held(memory, names[1]) as living:
        (living / "file").write_bytes(b"weights of another")
        with pytest.raises(Transient, match="timeout"):
            asyncio.run(errands.run(verb, {field: str(memory)}, timeout_s=3.0))
        assert sorted(path.name for path in memory.iterdir()) == sorted((names[1], "ef" * 32))
        assert (living / "file").exists()
    assert [path.name for path in memory.iterdir()] == ["ef" * 32]


def test_a_courier_begins_with_room_that_one_before_it_left_taken_when_the_agent_was_killed_too(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    for name in (f".delta-{'ab' * 32}", f".{'cd' * 32}.new", ".of-somebody", "ef" * 32):
        (tmp_path / name).mkdir()
        (tmp_path / name / "target").write_bytes(b"weights")
    with scraps.held(tmp_path, f".{'cd' * 32}.new") as place:
        assert list(place.iterdir()) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted((place.name, ".of-somebody", "ef" * 32))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".of-somebody", "ef" * 32]


@pytest.mark.attack("symlink")
def test_links_in_the_place_of_a_folder_in_memory_are_not_followed(tmp_path: Path) -> None:
    name = f".delta-{'ab' * 32}"
    own = tmp_path / "own"
    (own / name).mkdir(parents=True, mode=0o700)
    own.chmod(0o700)
    (own / name / "precious").write_text("x")
    (tmp_path / "link").symlink_to(own)
    scraps.tidy(tmp_path / "link")
    memory = tmp_path / "memory"
    memory.mkdir(mode=0o700)
    (memory / name).symlink_to(own / name)
    scraps.tidy(memory)
    with pytest.raises(OSError, match=r"Not a directory|symbolic"), scraps.held(memory, name):
        pass
    open_to_all = tmp_path / "open"
    (open_to_all / name).mkdir(parents=True)
    open_to_all.chmod(0o777)
    scraps.tidy(open_to_all)
    assert (own / name / "precious").exists() and (open_to_all / name).exists()


# --- the control socket ----------------------------------------------------------------------------------------------


def with_control(path: Path, *requests: tuple[str, str, dict[str, Any] | None]) -> list[Answer]:
    async def hello(body: dict[str, Any]) -> Answer:
        return Answer(200, {"got": body})

    async def text(_body: dict[str, Any]) -> Answer:
        return Answer(200, b"metric 1\n")

    async def main() -> list[Answer]:
        server = ControlServer(path, {("POST", "/hello"): hello, ("GET", "/metrics"): text})
        await server.start()
        try:
            return [await asyncio.to_thread(ask, path, *request) for request in requests]
        finally:
            await server.stop()

    return asyncio.run(main())


def test_the_control_socket_answers_also_in_a_very_deep_folder(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    hello, metrics, unknown, wrong = with_control(
        folder / "control.sock", ("POST", "/hello", {"x": 1}), ("GET", "/metrics", None), ("GET", "/no", None), ("GET", "/hello", None)
    )  # fmt: skip
    assert hello == Answer(200, {"got": {"x": 1}})
    assert metrics == Answer(200, b"metric 1\n")
    assert (unknown.status, wrong.status) == (404, 405)
    assert not (folder / "control.sock").exists()


def test_a_request_that_fails_is_answered_with_500_and_the_next_one_is_served(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    async def full(_body: dict[str, Any]) -> Answer:
        raise Degraded("store_full", "no room")

    async def bug(_body: dict[str, Any]) -> Answer:
        raise KeyError("x")

    async def main() -> list[Answer]:
        server = ControlServer(path, {("POST", "/full"): full, ("POST", "/bug"): bug})
        await server.start()
        try:
            return [await asyncio.to_thread(ask, path, "POST", target) for target in ("/full", "/bug", "/full")]
        finally:
            await server.stop()

    first, second, third = asyncio.run(main())
    assert first == third == Answer(500, {"error": "store_full: no room", "code": "store_full"})
    assert (second.status, second.body.keys()) == (500, {"error"})


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"POST /hello HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /hello HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
        b"POST /hello HTTP/1.1\r\nContent-Length: 3\r\n\r\n{x}",
        b"POST /hello HTTP/1.1\r\nContent-Length: 2\r\n\r\n[]",
        b"GET /hello HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
)
def test_a_malformed_request_gets_400_and_the_next_one_is_served(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "control.sock"

    async def hello(body: dict[str, Any]) -> Answer:
        return Answer(200, {})

    def send() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(path))
            sock.sendall(raw)
            return sock.recv(1000)

    async def main() -> tuple[bytes, Answer]:
        server = ControlServer(path, {("POST", "/hello"): hello})
        await server.start()
        try:
            return await asyncio.to_thread(send), await asyncio.to_thread(ask, path, "POST", "/hello")
        finally:
            await server.stop()

    first, second = asyncio.run(main())
    assert first.startswith(b"HTTP/1.1 400 ")
    assert second.status == 200


# --- uploads ---------------------------------------------------------------------------------------------------------


class Outbox:
    """Ten records of a few bytes each, in memory; freezing and dropping are noted."""

    def __init__(self, body: bytes = b"x" * 10) -> None:
        self.records = {seq: wire.Record(seq=seq, kind="window", body=body) for seq in range(1, 11)}
        self.sent: set[int] = set()
        self.dropped: list[int] = []

    def next_batch(self, in_flight: Any, *, max_bytes: int, max_records: int) -> wire.Batch | None:
        flying = {seq for _, seq in in_flight}
        chosen: list[wire.Record] = []
        for seq, record in self.records.items():
            if seq not in flying and (not chosen or sum(len(r.body) for r in chosen) + len(record.body) <= max_bytes):
                chosen.append(record)
        return wire.Batch(epoch="e" * 32, records=tuple(chosen)) if chosen else None

    def mark_sent(self, epoch: str, seqs: tuple[int, ...]) -> None:
        self.sent |= set(seqs)

    def drop(self, epoch: str, seq: int, at: w.Instant, why: str) -> None:
        self.dropped.append(seq)
        del self.records[seq]


def upload(outbox: Outbox, published: list[list[int]], *, window: int = 2) -> Upload:
    def publish(payload: bytes) -> bool:
        published.append([record.seq for record in wire.decode_batch(payload).records])
        assert set(published[-1]) <= outbox.sent, "published before it was frozen"
        return True

    found = Upload(outbox, publish, window=window, batch_bytes=30, ack_s=10.0)
    found.open = True
    return found


def test_no_more_than_the_window_is_on_its_way() -> None:
    outbox, published = Outbox(), list[list[int]]()
    up = upload(outbox, published)
    up.pump(0.0, AT)
    up.pump(1.0, AT)
    assert published == [[1, 2, 3], [4, 5, 6]]
    up.acknowledged(wire.Ack(epoch="e" * 32, upto=2))
    assert up.pump(2.0, AT) == 0
    up.acknowledged(wire.Ack(epoch="e" * 32, upto=3))
    up.pump(3.0, AT)
    assert published[2] == [1, 2, 3] or published[2] == [7, 8, 9]
    assert up.in_flight == 2


def test_what_is_not_acknowledged_in_time_is_sent_again() -> None:
    outbox, published = Outbox(), list[list[int]]()
    up = upload(outbox, published, window=1)
    up.pump(0.0, AT)
    up.pump(9.9, AT)
    up.pump(10.0, AT)
    assert published == [[1, 2, 3], [1, 2, 3]]
    up.again()
    up.pump(10.1, AT)
    assert published[2] == [1, 2, 3]


def test_nothing_is_sent_while_the_server_is_away() -> None:
    outbox, published = Outbox(), list[list[int]]()
    up = upload(outbox, published)
    up.open = False
    assert up.pump(0.0, AT) == 0
    assert (published, outbox.sent) == ([], set())


def test_a_record_larger_than_any_message_is_given_up_and_the_rest_goes_on() -> None:
    import random

    outbox, published = Outbox(), list[list[int]]()
    outbox.records[1] = wire.Record(seq=1, kind="window", body=random.Random(1).randbytes(wire.MAX_MESSAGE_BYTES + 1))
    up = upload(outbox, published)
    up.pump(0.0, AT)
    assert outbox.dropped == [1]
    assert published[0] == [2, 3, 4]


# --- clock, service manager, command line -----------------------------------------------------------------------------


def test_the_signed_lower_bound_holds_against_a_wrong_clock() -> None:
    clock = Clock()
    assert clock.now_s() == pytest.approx(clock.wall_s(), abs=5)
    clock.set_lower_bound(9e9)
    assert clock.now_s() == 9e9
    assert len(clock.instant().boot_id) == 32
    assert clock.boot_s() > 0


def test_the_service_manager_hears_ready_and_a_missing_one_does_no_harm(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        notify = Notify({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "10000000"})
        notify.tell("READY=1", "STATUS=up")
        assert listener.recv(100) == b"READY=1\nSTATUS=up"
        assert notify.interval_s == 5.0
    notify.tell("WATCHDOG=1")
    silent = Notify({})
    silent.tell("READY=1")
    assert silent.interval_s is None
    assert Notify({"WATCHDOG_USEC": "10", "WATCHDOG_PID": "1"}).interval_s is None


def test_a_service_manager_that_does_not_read_stops_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        notify = Notify({"NOTIFY_SOCKET": path})
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, contextlib.suppress(BlockingIOError):
            other.setblocking(False)
            while True:
                other.sendto(b"full", path)
        began = time.monotonic()
        notify.tell("WATCHDOG=1")
        assert time.monotonic() - began < 10.0
        assert listener.recv(100) == b"full"
        notify.tell("WATCHDOG=1")
        listener.setblocking(False)
        said = []
        with contextlib.suppress(BlockingIOError):
            while True:
                said.append(listener.recv(100))
        assert said.count(b"WATCHDOG=1") == 1


def test_the_commands_have_their_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "agent.toml"
    good.write_text(f'state_dir = "{tmp_path}"')
    bad = tmp_path / "bad.toml"
    bad.write_text("state_dir = 3\ncolour = 1\n")
    assert cli.main(["lifecycle", "--print"]) == 0
    assert "confirmed_on_golden" in capsys.readouterr().out
    assert cli.main(["status", "--config", str(bad)]) == 2
    assert capsys.readouterr().err.count("skerry-agent:") == 2
    assert cli.main(["status", "--config", str(good)]) == 1
    assert "not_running" in capsys.readouterr().err
    assert cli.main(["run", "--config", str(good)]) == 1
    assert "skerry-agent enrol" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["fly"])
    assert caught.value.code == 2
