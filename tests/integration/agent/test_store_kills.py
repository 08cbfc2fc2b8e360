"""kill -9 at random moments while the store is written, sent from and freed: it opens every time, loses nothing and doubles nothing."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from skerry_agent.store import Store, open_store
from skerry_agent.upload import Upload
from skerry_contract import window as w
from skerry_contract import wire

from tests.unit.agent.test_outbox_model import Server

ROOT = Path(__file__).parents[3]
AT = w.Instant("b" * 32, 1, 2, True)
BOUND = 40_000
# Forks a writer for each line that it reads: a fresh interpreter for each would take most of the time.
WRITERS = """
import os, random, sys, time
from pathlib import Path
from skerry_agent.store import Entry, RingAt, open_store
from skerry_agent.upload import Upload
from skerry_contract import window as w, wire
AT = w.Instant("b" * 32, 1, 2, True)
folder = Path(sys.argv[1])

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def publish(payload):
    tell("sent", payload.hex())
    return True

def live(number):
    rng = random.Random(number)
    store, opened = open_store(folder / "state.db", binding="m", device="d-1", new_epoch=lambda: "e" * 32, wall_s=0.0, bound_bytes=40_000)
    store._db.execute("PRAGMA wal_autocheckpoint = 40")
    tell("opened", opened.new_epoch or "-", opened.moved_aside or "-")
    upload = Upload(store, publish, window=3, batch_bytes=4000, ack_s=0.05)
    upload.open = True
    upto = store.ring_upto("r") or 0
    heard = (folder / "acks").open("rb")
    while True:
        entries = []
        for _ in range(rng.randrange(1, 5)):
            ok = rng.randrange(5)
            upto += ok
            key = w.Key("gas", "a" * 64, "v", "none", "", rng.randrange(3))
            resources = {f"r{i}_n": 1 for i in range(rng.randrange(80))}
            body = wire.encode(w.Window(key=key, start=AT, end=AT, counts=w.Counts(ok=ok), resources=resources))
            entries.append(Entry(kind="window", body=body, key=str(key.stage), inferences=ok))
        store.append(entries, [RingAt(ring="r", upto=upto)])
        tell("committed", upto)
        store.put("lifecycle", {"step": upto})
        if store.load()[0] > BOUND:
            store.compact(AT)
        upload.pump(time.monotonic(), AT)
        for line in heard:
            if line.endswith(b"\\n"):
                ack = wire.decode(wire.Ack, bytes.fromhex(line.decode()))
                store.acknowledge(ack)
                upload.acknowledged(ack)
        store.tidy()

BOUND = 40_000
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        live(int(line))
    os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("kills", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(tmp_path: Path, kills: int) -> None:
    rng = random.Random(kills)
    server, committed, told = Server(), 0, 0
    acks = tmp_path / "acks"
    acks.touch()
    zygote = subprocess.Popen(
        [sys.executable, "-c", WRITERS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    os.set_blocking(zygote.stdout.fileno(), False)
    rest = b""
    with acks.open("ab", buffering=0) as answers:

        def hear(*, until_s: float, until_opened: bool) -> bool:
            """Reads what the writer says for a while. Whether it opened the store."""
            nonlocal rest, committed, told
            opened = False
            while time.monotonic() < until_s and not (until_opened and opened):
                data = zygote.stdout.read()
                if not data:
                    time.sleep(0.001)
                    continue
                *lines, rest = (rest + data).split(b"\n")
                for word, _, words in (line.decode().partition(" ") for line in lines):
                    told += 1
                    if word == "opened":
                        assert words == ("first -" if committed == 0 and not server.taken else "- -"), words
                        opened = True
                    elif word == "committed":
                        committed = max(committed, int(words))
                    else:
                        ack = server.take(bytes.fromhex(words))
                        if rng.random() < 0.7:
                            answers.write(ack.hex().encode() + b"\n")
            return opened

        try:
            for number in range(kills):
                zygote.stdin.write(b"%d\n" % number)
                zygote.stdin.flush()
                assert hear(until_s=time.monotonic() + 60, until_opened=True), "the store did not open"
                hear(until_s=time.monotonic() + rng.uniform(0.0, 0.06), until_opened=False)
                writer = child_of(zygote.pid)
                os.kill(writer, signal.SIGKILL)
                # What it said before it died counts; a line that it did not end does not.
                while child_of(zygote.pid, none=True) == writer:
                    time.sleep(0.001)
                hear(until_s=time.monotonic() + 0.005, until_opened=False)
                rest = b""
        finally:
            with contextlib.suppress(IndexError, ProcessLookupError):
                os.kill(child_of(zygote.pid), signal.SIGKILL)
            zygote.stdin.close()
            zygote.wait(30)
            zygote.stdout.close()
    store, opened = open_store(
        tmp_path / "state.db", binding="m", device="d-1", new_epoch=lambda: "f" * 32, wall_s=0.0, bound_bytes=BOUND
    )
    assert opened.new_epoch == ""
    upto = store.ring_upto("r") or 0
    assert upto >= committed > 0, "something committed is lost"
    drain(store, server)
    assert server.conflicts == 0
    assert server.inferences() + server.told_lost()[1] == upto
    assert server.told_lost()[1] == store.lost().get("inferences_dropped", 0)
    store.close()


def drain(store: Store, server: Server) -> None:
    acks: list[bytes] = []

    def publish(payload: bytes) -> bool:
        acks.append(server.take(payload))
        return True

    upload = Upload(store, publish, window=3, batch_bytes=1 << 16, ack_s=5.0)
    upload.open = True
    while store.pending()[0]:
        assert upload.pump(0.0, AT)
        while acks:
            ack = wire.decode(wire.Ack, acks.pop(0))
            store.acknowledge(ack)
            upload.acknowledged(ack)


def child_of(pid: int, *, none: bool = False) -> int:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found or not none else 0
