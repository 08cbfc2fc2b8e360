"""The device itself: agent, state folder, store, clock, identity, root of trust."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sqlite3
import ssl
import stat
import struct
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # ships no types

from skerry_agent.config import Config
from skerry_agent.control import ask
from skerry_agent.doctor.finding import NET_S, Finding, Patient, Verdict
from skerry_agent.errors import AgentError
from skerry_agent.identity import identity
from skerry_agent.link import tls_context
from skerry_agent.store.opening import moved_aside_of

_DAY_S = 86400.0
_LITTLE_DISK_BYTES = 16 << 20
_FEW_FILES = 16
_HELD_S, _LOOKS = 3.0, 12
_FLOCK = struct.Struct("@hhqqi")
_WAL_WRITE_LOCK = 120


def check_agent(patient: Patient) -> Iterator[Finding]:
    """Whether an agent runs and answers on its control socket."""
    try:
        answer = ask(patient.config.run_dir / "control.sock", "GET", "/skerry/v1/status", timeout_s=NET_S)
    except PermissionError as error:
        yield Finding(check="agent", verdict="fail", detail=str(error), advice="run doctor as the agent's user")
        return
    except TimeoutError:
        yield Finding(
            check="agent",
            verdict="fail",
            detail=f"runs, and does not answer within {NET_S:g} s",
            advice="restart it: systemctl restart skerry-agent; its log says what it did last",
        )
        return
    except OSError as error:
        yield Finding(
            check="agent",
            verdict="fail",
            detail=f"does not run: {error}",
            advice="start it: systemctl start skerry-agent, or skerry-agent run",
        )
        return
    patient.status = answer.body
    yield Finding(check="agent", verdict="ok", detail=f"{answer.body['agent']}, up as {answer.body['device']}")


def check_address(patient: Patient) -> Iterator[Finding]:
    """Whether the address of the local endpoint is the agent's, or free for it."""
    host, port = patient.config.serving.host, patient.config.serving.port
    if port == "none":
        yield Finding(check="address", verdict="ok", detail="no TCP address; see serving.socket")
        return
    if patient.status is not None:
        yield Finding(check="address", verdict="ok", detail=f"{host}: the agent has it")
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
    except OSError as error:
        yield Finding(
            check="address",
            verdict="fail",
            detail=f"{host}:{port}: {error.strerror}{_listener(port)}",
            advice="end the program that has it, or change serving.host and serving.port",
        )
        return
    yield Finding(check="address", verdict="ok", detail=f"{host}:{port} is free")


def _listener(port: int) -> str:
    try:
        found = next(
            c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port and c.pid
        )
        return f"; {psutil.Process(found).name()}, process {found}, listens there"
    except (StopIteration, psutil.Error, OSError):
        # Other users' programs are not shown.
        return ""


def check_state(patient: Patient) -> Iterator[Finding]:
    """Whether the state folder can be written, is private, and has room."""
    folder = patient.config.state_dir
    advice = f"make {folder} a folder of the agent's user with mode 0700"
    if not folder.is_dir():
        yield Finding(check="state folder", verdict="fail", detail=f"{folder} is not there", advice=advice)
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"doctor")
    except OSError as error:
        if error.errno == errno.EROFS:
            advice = "mount it to be written; a card that was remounted to be read only is worn out: replace it"
        elif error.errno == errno.ENOSPC:
            advice = "make room on the device's disk"
        yield Finding(check="state folder", verdict="fail", detail=f"{folder}: {error.strerror}", advice=advice)
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        yield Finding(
            check="state folder",
            verdict="warn",
            detail=f"{folder} has mode {mode:04o}: others can read keys and counts",
            advice=f"chmod 0700 {folder}",
        )
    else:
        yield Finding(check="state folder", verdict="ok", detail=f"{folder} can be written")
    free = psutil.disk_usage(str(folder)).free
    limits = patient.config.limits
    wanted = (limits.disk_reserve_mb + limits.outbox_mb) * 1e6
    disk = os.statvfs(folder)
    # A file system that counts no files has room for any.
    files = disk.f_favail if disk.f_files else None
    few = files is not None and files < limits.file_reserve
    lack = free < _LITTLE_DISK_BYTES or (files is not None and files < _FEW_FILES)
    verdict: Verdict = "fail" if lack else "warn" if free < wanted or few else "ok"
    counted = "" if files is None else f"; names for {files} more files, updates leave {limits.file_reserve}"
    yield Finding(
        check="disk",
        verdict=verdict,
        detail=f"{free / 1e6:.0f} MB free, reserve and outbox may want {wanted / 1e6:.0f}{counted}",
        advice="" if verdict == "ok" else "make room: counts may have to be dropped and updates are refused",
    )


def check_clock(patient: Patient) -> Iterator[Finding]:
    """Whether the wall clock is synchronised, and not behind a signed time."""
    row = _stored(patient.config, "lower_bound_s")
    bound_s = float(row or 0.0)
    if patient.clock.wall_s() < bound_s - 60:
        yield Finding(
            check="clock",
            verdict="fail",
            detail=f"the wall clock is {(bound_s - patient.clock.wall_s()) / 3600:.1f} h behind a time the server signed",
            advice="set the clock; enable a time service (systemd-timesyncd, chrony)",
        )
    elif not patient.clock.synced():
        yield Finding(
            check="clock",
            verdict="warn",
            detail="the kernel does not call the wall clock synchronised",
            advice="enable a time service (systemd-timesyncd, chrony); updates go on, times in reports may be wrong",
        )
    else:
        yield Finding(check="clock", verdict="ok", detail="synchronised")


def check_identity(patient: Patient) -> Iterator[Finding]:
    """Whether the key fits the certificate, and how long that is valid."""
    try:
        patient.identity = identity(patient.config)
    except AgentError as error:
        yield Finding(check="identity", verdict="fail", detail=error.detail, advice=error.advice)
        return
    # Only this command needs it, and only here.
    from cryptography import x509

    found = patient.identity
    try:
        certificate = x509.load_pem_x509_certificate(found.certificate.read_bytes())
        tls_context(found)
    except (ValueError, ssl.SSLError, OSError) as error:
        yield Finding(
            check="identity",
            verdict="fail",
            detail=f"{found.certificate} and {found.key}: {error}",
            advice="enrol the device again",
        )
        return
    begins, ends = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    left_s = ends - patient.clock.now_s()
    said = f"{found.device} in group {found.group}, certificate valid for {left_s / _DAY_S:.1f} days"
    if left_s <= 0:
        yield Finding(
            check="identity",
            verdict="fail",
            detail=f"the certificate of {found.device} expired {-left_s / _DAY_S:.1f} days ago",
            advice=(
                "the agent renews it by itself when the server answers, within the server's days of grace; later an operator "
                f"allows it: skerry device renew {found.device}"
            ),
        )
    elif left_s < (ends - begins) / 6:
        # The agent renews when a third is left: by now it has failed for a while.
        yield Finding(
            check="identity",
            verdict="warn",
            detail=said,
            advice="it should have been renewed: see whether the server can be reached and refuses",
        )
    else:
        yield Finding(check="identity", verdict="ok", detail=said)


def check_root(patient: Patient) -> Iterator[Finding]:
    """Whether the root of trust is here, and metadata was verified from it."""
    root = patient.config.identity_dir / "root.json"
    versions = sorted((patient.config.state_dir / "tuf").rglob("timestamp.json"))
    if not root.is_file():
        yield Finding(
            check="root of trust",
            verdict="fail",
            detail=f"{root} is not there",
            advice="enrol with a token that the operator's tool completed (skerry device token)",
        )
    elif not versions:
        yield Finding(
            check="root of trust",
            verdict="warn",
            detail="root.json is here; no update metadata was ever verified",
            advice="skerry-agent sync, then skerry-agent status",
        )
    else:
        age_s = time.time() - versions[0].stat().st_mtime
        yield Finding(check="root of trust", verdict="ok", detail=f"metadata verified {age_s / 3600:.1f} h ago")


def check_store(patient: Patient) -> Iterator[Finding]:
    """Whether the store is sound, how much waits in its outbox, and what was lost."""
    path = patient.config.state_dir / "state.db"
    aside = moved_aside_of(path)
    if aside:
        size_mb = sum(file.stat().st_size for file in aside) / 1e6
        yield Finding(
            check="damaged store",
            verdict="warn",
            detail=f"{aside[0]} was moved aside, {size_mb:.1f} MB with what belongs to it",
            advice="look at the disk or card; then remove the file, or copy it to whoever is to read it: the next one takes its place",
        )
    if not path.exists():
        yield Finding(check="store", verdict="ok", detail="not made yet: the agent has never run")
        return
    try:
        with _open(path) as database:
            said = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
            pending, size = database.execute("SELECT count(*), coalesce(sum(size), 0) FROM outbox").fetchone()
    except sqlite3.Error as error:
        said, pending, size = str(error), 0, 0
    if said != "ok":
        yield Finding(
            check="store",
            verdict="fail",
            detail=f"{path}: {said}",
            advice="restart the agent: it moves the file aside, begins a new one and reports the loss",
        )
        return
    if (holder := _holder(path)) != 0:
        yield Finding(
            check="store",
            verdict="fail",
            detail=f"{path}: process {holder} has locked it for more than {_HELD_S:g} s",
            advice="end that program (a backup, a database shell): the agent can store nothing meanwhile",
        )
        return
    yield Finding(check="store", verdict="ok", detail=f"{path.stat().st_size / 1e6:.1f} MB, quick check ok")
    share = size / (patient.config.limits.outbox_mb * 1e6)
    lost = {cause: n for cause, n in (_stored(patient.config, "lost") or {}).items() if n}
    detail = f"{pending} records wait, {size / 1e6:.2f} MB, {share:.0%} of the bound"
    if share >= 0.5:
        yield Finding(
            check="outbox",
            verdict="fail" if share >= 0.9 else "warn",
            detail=detail,
            advice="the server has not acknowledged for long: see server and broker; the oldest counts are merged next",
        )
    else:
        yield Finding(check="outbox", verdict="ok", detail=detail)
    if lost:
        causes = ", ".join(f"{cause} {n}" for cause, n in sorted(lost.items()))
        yield Finding(
            check="losses", verdict="warn", detail=causes, advice="the server knows of them; see the agent's log"
        )


def _holder(path: Path) -> int:
    """The process whose write lock on the store outlasts every commit of an agent; 0 for none. Takes no lock itself.

    SQLite's writers lock one byte of the index of the write-ahead log (https://sqlite.org/walformat.html, 2.3.1).
    """
    holders = set()
    try:
        with open(f"{path}-shm", "rb") as file:
            for _ in range(_LOOKS):
                asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _WAL_WRITE_LOCK, 1, 0)
                kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
                if kind == fcntl.F_UNLCK:
                    return 0
                holders.add(pid)
                time.sleep(_HELD_S / _LOOKS)
    except OSError:
        return 0
    return int(holders.pop()) if len(holders) == 1 else 0


def _stored(config: Config, key: str) -> Any:
    path = config.state_dir / "state.db"
    if not path.exists():
        return None
    try:
        with _open(path) as database:
            row = database.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
    except sqlite3.Error:
        # The store has a check of its own.
        return None
    return None if row is None else json.loads(row[0])


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection, closed at the end."""
    # Without a write-ahead log nobody has it open, and nothing needs to be made beside it to read it.
    still = "" if Path(f"{path}-wal").exists() else "&immutable=1"
    connection = sqlite3.connect(f"file:{urllib.parse.quote(os.fspath(path))}?mode=ro{still}", uri=True, timeout=NET_S)
    try:
        yield connection
    finally:
        connection.close()
