"""The verb ``fetch``: the files of a bundle into staging, resumable at any byte.

Owns ``slots/.staging/<digest>/`` while it runs: finished files under their own names, unfinished ones as ``.<name>.part``, and
last of all ``manifest.json``. The manifest's digest was verified by ``manifest``; every file must have the size and the
sha256 that it names, whatever the network, the cache on the way or the disk did.

A part file is not trusted either: it is hashed again before it grows. So nothing needs to be synced while it grows, and a
file that a power cut left with a hole is found by its hash and fetched again.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skerry_contract import layout
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError

from skerry_agent.courier import durable, requests, transport, watch
from skerry_agent.errors import Degraded, Rejected, Transient

_LOCK_WAIT_S = 20.0
_PROGRESS_S = 0.5
_MAX_PAUSE_S = 30.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")

Report = Callable[[dict[str, Any]], None]


def fetch(request: requests.Fetch, report: Report) -> dict[str, Any]:
    """Brings every file here. Called again after any interruption, it goes on where it was.

    Args:
        request: what to fetch.
        report: gets {file, done, size, total_done, total_size} in bytes, at most twice a second.

    Returns:
        ``bytes`` that came over the network in this run.

    Raises:
        Rejected: ``hash_mismatch``, ``size_mismatch``, ``malformed_manifest``, ``bad_request``.
        Transient: ``unreachable``, ``timeout``, ``busy``, with what came so far kept.
        Degraded: ``not_enough_disk``, ``storage_failed``, ``not_enrolled``.
    """
    manifest = _checked(request)
    staging = Path(request.state_dir) / "slots" / ".staging" / request.digest
    try:
        with durable.alone(Path(request.state_dir) / "run" / f"fetch-{request.digest[:16]}.lock", _LOCK_WAIT_S):
            durable.make_folder(staging)
            with watch.Watch(request.limits.slow_s) as overdue:
                run = _Run(request, staging, report, overdue)
                for file in request.files:
                    run.bring(file)
            durable.write(staging / manifests.MANIFEST_FILE, manifest, mode=0o644)
            return {"bytes": run.received}
    except OSError as error:
        raise durable.disk_error(error) from error


class _Run:
    def __init__(self, request: requests.Fetch, staging: Path, report: Report, overdue: watch.Watch) -> None:
        ca_path = request.identity / "fleet-ca.pem"
        try:
            ca_pem = ca_path.read_text()
        except FileNotFoundError:
            raise Degraded("not_enrolled", f"{ca_path} is not there", advice="enrol the device") from None
        self._web = transport.Web(
            server_url=request.server_url, ca_pem=ca_pem, now_s=request.now_s, gap_s=request.limits.gap_s
        )
        self._request = request
        self._limits = request.limits
        self._staging = staging
        self._report = report
        self._overdue = overdue
        self._total = sum(file.size for file in request.files)
        self._finished = 0
        self._reported = float("-inf")
        self._rate = _Rate(request.max_kib_s * 1024)
        self._unwatched = 0
        self.received = 0

    def bring(self, file: requests.File) -> None:
        """Until the file is here, whole and synced, or it is clear that it will not come."""
        path = self._staging / file.path
        durable.make_folder(path.parent)
        if not self._is_here(path, file):
            self._download(path, file)
        self._finished += file.size
        self._progress(file, file.size, force=True)

    def _is_here(self, path: Path, file: requests.File) -> bool:
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        self._overdue.stop()
        with path.open("rb") as stream:
            held = hashlib.file_digest(stream, "sha256").hexdigest()
        self._overdue.wind()
        return held == file.sha256

    def _download(self, path: Path, file: requests.File) -> None:
        part = path.with_name(f".{path.name}.part")
        tag = path.with_name(f".{path.name}.etag")
        idle = 0
        anew = False
        for attempt in range(self._limits.attempts):
            before = self.received
            self._overdue.wind()
            try:
                resumed = self._one_connection(part, tag, file)
            except Transient:
                # A connection that brought something does not count as idle.
                idle = 0 if self.received > before else idle + 1
                if idle >= self._limits.idle_attempts or attempt + 1 == self._limits.attempts:
                    raise
                self._overdue.stop()
                time.sleep(_pause_s(self._limits.pause_s, idle))
                continue
            self._overdue.stop()
            got = self._settle(path, part, tag, file)
            if got is None:
                self._overdue.wind()
                return
            # Bytes of another day may be torn or of another file: once more from the start before anyone is blamed.
            if not resumed or anew:
                raise Rejected("hash_mismatch", f"{file.path}: wanted sha256 {file.sha256}, got {got}")
            anew = True
        raise Transient("unreachable", f"{file.path}: not here after {self._limits.attempts} connections")

    def _settle(self, path: Path, part: Path, tag: Path, file: requests.File) -> str | None:
        """Gives a complete part its name. Returns the digest that it has when it is the wrong one; then it is gone."""
        descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            got = hashlib.file_digest(stream, "sha256").hexdigest()
            if got == file.sha256:
                os.fsync(stream.fileno())
        tag.unlink(missing_ok=True)
        if got != file.sha256:
            part.unlink()
            return got
        part.replace(path)
        durable.sync_folder(path.parent)
        return None

    def _one_connection(self, part: Path, tag: Path, file: requests.File) -> bool:
        """Reads until the part is complete. Returns whether it began with bytes that were here before."""
        offset = part.stat().st_size if part.exists() else 0
        if offset == file.size and part.exists():
            return True
        if offset > file.size:
            part.unlink()
            offset = 0
        headers = {}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if tag.exists():
                headers["If-Range"] = tag.read_text()
        url = f"{self._request.repository_url.rstrip('/')}/{layout.blob(file.sha256)}"
        with self._web.open("GET", url, headers=headers) as response:
            if response.status == 416:
                part.unlink(missing_ok=True)
                raise Transient("unreachable", f"{url}: HTTP 416, beginning anew")
            if response.status == 206:
                match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if match is None or int(match[1]) != offset:
                    raise Transient("unreachable", f"{url}: another range than bytes {offset}- came back")
                if match[3] not in ("*", str(file.size)):
                    raise Rejected("size_mismatch", f"{file.path}: wanted {file.size} bytes, the server has {match[3]}")
            elif response.status == 200:
                offset = 0
                if response.length is not None and response.length != file.size:
                    raise Rejected("size_mismatch", f"{file.path}: wanted {file.size} bytes, offered {response.length}")
            elif response.status in (404, 410):
                raise Transient("unreachable", f"{url}: HTTP {response.status}: the repository does not have it")
            else:
                raise Transient("unreachable", f"{url}: HTTP {response.status}")
            _remember(tag, response.headers.get("ETag", ""))
            with part.open("ab" if offset else "wb") as stream:
                done = offset
                for piece in transport.pieces(response, url):
                    done += len(piece)
                    if done > file.size:
                        stream.truncate(0)
                        raise Rejected("size_mismatch", f"{file.path}: more than {file.size} bytes came")
                    stream.write(piece)
                    self._account(file, done, len(piece))
            if done < file.size:
                raise Transient("unreachable", f"{url}: ended after {done} of {file.size} bytes")
        return offset > 0

    def _account(self, file: requests.File, done: int, size: int) -> None:
        self.received += size
        self._unwatched += size
        if self._unwatched >= self._limits.slow_bytes:
            self._unwatched = 0
            self._overdue.wind()
        pause_s = self._rate.pause_s(size, time.monotonic())
        if pause_s > 0:
            # Our own slowness is not the peer's.
            self._overdue.stop()
            time.sleep(pause_s)
            self._overdue.wind()
        self._progress(file, done)

    def _progress(self, file: requests.File, done: int, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._reported >= _PROGRESS_S:
            self._reported = now
            total = self._finished + (0 if force else done)
            self._report(
                {"file": file.path, "done": done, "size": file.size, "total_done": total, "total_size": self._total}
            )


class _Rate:
    """A rate limit in bytes per second, 0 for none; at most a quarter of a second of it may come at once."""

    def __init__(self, bytes_s: int) -> None:
        self._bytes_s = bytes_s
        self._free_at = float("-inf")

    def pause_s(self, size: int, now: float) -> float:
        """How long to wait after ``size`` bytes came at ``now``."""
        if not self._bytes_s:
            return 0.0
        self._free_at = max(self._free_at, now - 0.25) + size / self._bytes_s
        return self._free_at - now


def _checked(request: requests.Fetch) -> bytes:
    """The manifest's bytes, when they are those of the digest and name every file that is asked for."""
    data = request.manifest.encode()
    if manifests.digest(data) != request.digest:
        raise Rejected("hash_mismatch", f"manifest: wanted digest {request.digest}, got {manifests.digest(data)}")
    try:
        named = {file.path: file for file in manifests.parse(data).files()}
    except ContractError as error:
        raise Rejected("malformed_manifest", str(error)) from None
    for file in request.files:
        # Whoever is equal to a file of a parsed manifest has a plain path and a digest.
        listed = named.get(file.path)
        if listed is None or (listed.sha256, listed.size) != (file.sha256, file.size):
            raise Rejected("bad_request", f"{file.path}: the manifest does not name it so")
    return data


def _remember(tag: Path, etag: str) -> None:
    """Keeps a strong validator, so that a resumed download is of the same file. A weak one may not be used (RFC 9110, 13.1.5)."""
    if etag.startswith('"') and len(etag) <= 256 and etag.isascii() and etag.isprintable():
        tag.write_text(etag)
    else:
        tag.unlink(missing_ok=True)


def _pause_s(base_s: float, idle: int) -> float:
    """Full jitter (0 to the cap) over a doubling cap, in seconds."""
    return random.uniform(0, min(_MAX_PAUSE_S, base_s * 2**idle))
