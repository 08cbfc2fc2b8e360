"""A link of some delay and loss between two ports of loopback, over which the kernel's own TCP goes, in network namespaces of its own.

``BadLink`` starts this module as a process, which makes two network namespaces with one interface each, and relays: a connection to a
port on this side becomes one over the link and, on the far side, one to the port behind it. Packets of the link go through the process.
Where the kernel has netem, netem delays and drops them; elsewhere the process does, by the same rule: every packet comes ``delay_s``
later, of each direction ``loss`` of them never. No model of TCP: what recovers from a loss is the kernel.

Nothing outside of the namespaces is touched: programs that set up a network are refused where the caller's own network is, and
namespaces, interfaces and relays go with the process, which ends when its input does.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

NEAR, FAR = "198.18.0.1", "198.18.0.2"
"""Of the block for benchmarks (RFC 2544): they exist inside of the namespaces alone."""
_QUEUE = 10_000
"""Packets that wait at most in each direction; more are dropped, as netem does."""
_MTU = 1500
_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x4004_54CA, 0x0001, 0x1000
_ROOT = Path(__file__).parents[2]
T = TypeVar("T")


class BadLink:
    """Relays to ports of loopback over such a link.

    Args:
        behind: the ports that are reached over it.
        delay_s: of each packet, each way.
        loss: of packets, each way, 0 to 1.
        seed: of which ones.

    Attributes:
        ports: where they are reached, in the same order.
        by: what delays and drops: ``netem`` or ``a process``; and the TCP that recovers.

    Raises:
        RuntimeError: no network namespace can be made here, or a program is missing.
    """

    def __init__(self, behind: Sequence[int], *, delay_s: float, loss: float, seed: int = 1) -> None:
        programs = [program for program in ("ip", "tc") if _found(program) is None]
        if programs:
            raise RuntimeError(f"no program {' and '.join(programs)}: install iproute2, e.g. apt-get install iproute2")
        command = [sys.executable, "-m", __spec__.name, json.dumps([list(behind), delay_s, loss, seed])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=_ROOT, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            why = self._process.stderr.read().strip().splitlines()
            self.close()
            raise RuntimeError(
                f"no network namespaces with a tun device here: {why[-1] if why else 'the process ended'}; "
                "run as root, or where users may make namespaces and open /dev/net/tun"
            )
        told = json.loads(line)
        self.ports: list[int] = told["ports"]
        self.by: str = told["by"]

    def __enter__(self) -> BadLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> tuple[int, int]:
        """Ends it; packets that were to be carried, and of them dropped, where the process did that."""
        out, _ = self._process.communicate("", timeout=30)
        found = json.loads(out) if out.strip() else [0, 0]
        return found[0], found[1]


class Side:
    """A thread in a network namespace of its own: what it opens is of that namespace.

    Args:
        name: of the interface; address: of this end.
        home: the network namespace in which nothing may be set up.
    """

    def __init__(self, name: str, address: str, home: int) -> None:
        self._home = home
        self._work: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._more = threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()
        self.tun = self.do(lambda: self._set_up(name, address))

    def do(self, what: Callable[[], T]) -> T:
        """Lets the thread do something."""
        done: Future[T] = Future()
        self._work.append((what, done))
        self._more.release()
        return done.result(60)

    def _run(self) -> None:
        while True:
            self._more.acquire()
            what, done = self._work.popleft()
            try:
                done.set_result(what())
            except BaseException as error:
                done.set_exception(error)

    def _set_up(self, name: str, address: str) -> int:
        _unshare(_CLONE_NEWNET)
        self._inside()
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        self.run("ip", "address", "add", f"{address}/30", "dev", name)
        self.run("ip", "link", "set", name, "mtu", str(_MTU), "up")
        return tun

    def run(self, program: str, *arguments: str) -> None:
        """A program that sets up this namespace's network."""
        self._inside()
        found = _found(program)
        assert found is not None
        done = subprocess.run([found, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")

    def _inside(self) -> None:
        refuse(self._home)


def refuse(home: int) -> None:
    """Sets up nothing where the caller is.

    Raises:
        RuntimeError: this thread is in that network namespace.
    """
    if namespace() == home:
        raise RuntimeError("this is the caller's own network: nothing is set up here")


class Wire:
    """Packets of one direction."""

    def __init__(self, source: int, sink: int, delay_s: float, loss: float, seed: int) -> None:
        self.source, self._sink = source, sink
        self._delay_s, self._loss = delay_s, loss
        self._random = random.Random(seed)
        self._waiting: collections.deque[tuple[float, bytes]] = collections.deque()
        self.seen = self.dropped = 0

    def take(self, now: float) -> None:
        """Reads what is there."""
        with contextlib.suppress(BlockingIOError):
            while packet := os.read(self.source, 1 << 16):
                self.seen += 1
                if self._random.random() < self._loss or len(self._waiting) >= _QUEUE:
                    self.dropped += 1
                else:
                    self._waiting.append((now + self._delay_s, packet))

    def give(self, now: float) -> float | None:
        """Writes what is due; when the next is, or None."""
        while self._waiting and self._waiting[0][0] <= now:
            with contextlib.suppress(OSError):
                os.write(self._sink, self._waiting.popleft()[1])
        return self._waiting[0][0] if self._waiting else None


def carry(wires: Sequence[Wire], over: threading.Event) -> None:
    """Until it is over."""
    while not over.is_set():
        now = time.monotonic()
        due = [when for wire in wires if (when := wire.give(now)) is not None]
        wait_s = min(0.2, max(0.0, min(due) - now)) if due else 0.2
        ready = select.select([wire.source for wire in wires], [], [], wait_s)[0]
        now = time.monotonic()
        for wire in wires:
            if wire.source in ready:
                wire.take(now)


def relay(listener: socket.socket, onward: Callable[[], socket.socket]) -> None:
    """Each connection of a listener to one of its own."""

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=join, args=(client,), daemon=True).start()

    def join(client: socket.socket) -> None:
        with client:
            try:
                further = onward()
            except OSError:
                return
            with further:
                back = threading.Thread(target=pump, args=(further, client), daemon=True)
                back.start()
                pump(client, further)
                back.join()

    threading.Thread(target=accept, daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """One direction, until it ends."""
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            sink.sendall(piece)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def main(ports: Sequence[int], delay_s: float, loss: float, seed: int) -> None:
    """The process."""
    home = namespace()
    if os.geteuid():
        # Before there are threads; who makes a user namespace may make network namespaces in it.
        _unshare(_CLONE_NEWUSER)
    near, far = Side("near", NEAR, home), Side("far", FAR, home)
    by = "netem"
    try:
        for side, name in ((near, "near"), (far, "far")):
            rule = ("delay", f"{delay_s * 1000:g}ms", "loss", f"{loss * 100:g}%", "limit", str(_QUEUE))
            side.do(
                lambda side=side, name=name, rule=rule: side.run(
                    "tc", "qdisc", "add", "dev", name, "root", "netem", *rule
                )
            )  # type: ignore[misc]
        wires = [Wire(near.tun, far.tun, 0.0, 0.0, 0), Wire(far.tun, near.tun, 0.0, 0.0, 0)]
    except OSError:
        by = "a process, for want of netem"
        for side, name in ((near, "near"), (far, "far")):
            with contextlib.suppress(OSError):
                side.do(lambda side=side, name=name: side.run("tc", "qdisc", "del", "dev", name, "root"))  # type: ignore[misc]
        wires = [Wire(near.tun, far.tun, delay_s, loss, seed), Wire(far.tun, near.tun, delay_s, loss, seed + 1)]
    over = threading.Event()
    carrying = threading.Thread(target=carry, args=(wires, over))
    carrying.start()
    told, recovers = [], ""
    for port in ports:
        behind = far.do(lambda: socket.create_server((FAR, 0)))
        recovers = _with_cubic(behind)
        relay(behind, lambda port=port: socket.create_connection(("127.0.0.1", port)))  # type: ignore[misc]
        place = (FAR, behind.getsockname()[1])
        here = socket.create_server(("127.0.0.1", 0))
        relay(here, lambda place=place: _over(near, place))  # type: ignore[misc]
        told.append(here.getsockname()[1])
    print(json.dumps({"ports": told, "by": f"{by}; TCP {recovers}"}), flush=True)
    sys.stdin.read()
    over.set()
    carrying.join()
    print(json.dumps([sum(wire.seen for wire in wires), sum(wire.dropped for wire in wires)]), flush=True)
    sys.stdout.flush()
    os._exit(0)


def _over(near: Side, place: tuple[str, int]) -> socket.socket:
    """A connection over the link; the socket is of the near namespace, whoever waits for it."""
    opened = near.do(socket.socket)
    _with_cubic(opened)
    try:
        opened.connect(place)
    except OSError:
        opened.close()
        raise
    return opened


def _with_cubic(end: socket.socket) -> str:
    """What most devices have recover from a loss, where this kernel has it; what this end has then."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    return end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def namespace() -> int:
    """The network namespace of this thread."""
    return os.stat(f"/proc/self/task/{threading.get_native_id()}/ns/net").st_ino


def _unshare(what: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(what):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
