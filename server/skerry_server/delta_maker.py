"""The loop that makes deltas: what do devices run, what will they be given, is it there? One at a time, in a child with limits.

A thread of its own; it never delays a rollout and never dies of one delta. What a device is served was made whole, tried and synced
before it got its name. After a crash the next look finds what is missing, and what lies there too much.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from skerry_contract import manifest as m
from skerry_runtime import patching
from sqlalchemy import Connection, Engine

from skerry_server import __version__, deltas, sealed_deltas
from skerry_server.config import Deltas as Settings
from skerry_server.core import deltas as core
from skerry_server.core.deltas import Pair
from skerry_server.db.engine import reading, writing

log = logging.getLogger(__name__)

_MOST_BUSY = 0.05
"""Share of the time that looks may take: where there are many devices, they are rarer."""
_MOST_PAUSE_S = 3600.0
_REHASH_S = 3600.0
"""A file is not hashed again sooner, however often devices complain."""
_FREE_BYTES = 256 << 20
"""Room that is left on the disk, beside what one delta needs while it is made."""
_JOIN_S = 5.0


class DeltaMaker:
    """Runs in a thread of its own.

    Args:
        repository: the repository's folder.
        scratch: where deltas are made; emptied here.
        now_ms: the server's clock.
        observe: gets the state that a delta came to, and seconds.
        content_key: of encrypted bundles, by digest.
    """

    def __init__(
        self,
        engine: Engine,
        repository: Path,
        scratch: Path,
        settings: Settings,
        now_ms: Callable[[], int],
        observe: Callable[[str, float], None] = lambda _state, _seconds: None,
        content_key: sealed_deltas.ContentKey = lambda _digest: None,
    ) -> None:
        self._engine = engine
        self._files = deltas.Files(repository)
        self._scratch = scratch
        self._settings = settings
        self._now_ms = now_ms
        self._observe = observe
        self._content_key = content_key
        self._manifests: dict[str, m.Manifest] = {}
        self._wanted_now: set[deltas.Key] = set()
        self._said: dict[deltas.Key, str] = {}
        self._heard = 0
        self._hashed_s: dict[deltas.Key, float] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700, parents=True)
        self._files.drop_leaky()

    def start(self) -> None:
        """Begins looking."""
        self._thread = threading.Thread(target=self._run, name="delta-maker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop, and the child under way."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=_JOIN_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            looked_s = 0.0
            try:
                # Not the wall clock: a step of it in the middle would make a pause of days.
                began_s = time.monotonic()
                due = self.look()
                looked_s = time.monotonic() - began_s
                if any(self.make(pair) for pair in due):
                    # At once the next: what is wanted most may be another one by now.
                    self._stopping.wait(min(looked_s / _MOST_BUSY, _MOST_PAUSE_S))
                    continue
            except Exception:
                log.exception("delta maker failed")
            self._stopping.wait(max(self._settings.look_s, min(looked_s / _MOST_BUSY, _MOST_PAUSE_S)))

    def look(self) -> list[Pair]:
        """Finds out what is wanted, tidies up, and returns what should be made now; what serves most devices comes first."""
        now_ms = self._now_ms()
        with reading(self._engine) as conn:
            pairs = self._wanted(conn)
            known = deltas.held(conn)
            promised = deltas.promised(conn)
            self._heard, doubted = deltas.complaints(conn, after=self._heard)
            doubted_files = self._files_of(conn, doubted)
        self._wanted_now = {(pair.base, pair.target) for pair in pairs}
        present = self._files.present()
        news = [pair for pair in pairs if core.is_news(known.get((pair.base, pair.target)), now_ms=now_ms)]
        over = [key for key, held in known.items() if core.is_over(held, now_ms=now_ms) and key not in self._wanted_now]
        lost = [key for key, held in known.items() if held.state == "ready" and key not in present]
        rotten = self._rotten(promised, present, doubted_files)
        # A file is whole from the moment it is there: only its row was not written any more.
        found = [key for key, held in known.items() if held.state in ("waiting", "making") and key in present]
        cut = {key: held for key, held in known.items() if held.state == "making" and key not in present}
        if news or over or lost or rotten or found or cut:
            with writing(self._engine) as conn:
                deltas.note_wanted(conn, news, now_ms=now_ms)
                for key in lost:
                    deltas.note(
                        conn, key, "waiting", now_ms=now_ms, size=None, detail="its file was not there any more"
                    )
                for key, detail in rotten.items():
                    log.warning("delta rotted from=%s to=%s %s", *key, detail)
                    deltas.note(conn, key, "waiting", now_ms=now_ms, size=None, sha256=None, attempts=0, detail=detail)
                for key in found:
                    told = {"size": present[key], "sha256": self._files.sha256(key), "maker": __version__}
                    deltas.note(conn, key, "ready", now_ms=now_ms, **told)
                for key, held in cut.items():
                    state, detail = core.after_a_crash(held)
                    deltas.note(conn, key, state, now_ms=now_ms, detail=detail)
                deltas.forget(conn, over)
                known = deltas.held(conn)
        self._files.drop([key for key in present if key not in known or known[key].state != "ready"])
        return [
            pair for pair in pairs if core.is_due(known[pair.base, pair.target], now_ms=now_ms, program=__version__)
        ]

    def _files_of(self, conn: Connection, digests: set[str]) -> set[str]:
        """sha256 of every file of these bundles."""
        found = deltas.manifests(conn, digests, {})
        return {file.sha256 for manifest in found.values() for file in manifest.files()}

    def _rotten(
        self,
        promised: dict[deltas.Key, tuple[int, str | None]],
        present: dict[deltas.Key, int],
        doubted: set[str],
    ) -> dict[deltas.Key, str]:
        """Of what is served, what is not the file any more that was made, and how that shows.

        Sizes are compared at each look; digests where devices say that what came gives another file, which may as well be their cache's.
        """
        found: dict[deltas.Key, str] = {}
        for key, (size, sha256) in promised.items():
            if key not in present:
                continue
            if present[key] != size:
                found[key] = f"its file had {present[key]} bytes, wanted {size}"
            elif key[1] in doubted and time.monotonic() - self._hashed_s.get(key, -_REHASH_S) >= _REHASH_S:
                self._hashed_s[key] = time.monotonic()
                if sha256 is None or self._files.sha256(key) != sha256:
                    found[key] = "its file was damaged: a device said that it gives another one"
        return found

    def _wanted(self, conn: Connection) -> list[Pair]:
        listed = deltas.runnable(conn)
        runs = [
            msgspec.structs.replace(run, goals=tuple(goal for goal in run.goals if goal in listed))
            for run in deltas.runs(conn)
        ]
        named = {run.digest for run in runs} | {goal for run in runs for goal in run.goals}
        self._manifests = deltas.manifests(conn, named, self._manifests)
        return core.wanted(runs, self._manifests)

    def make(self, pair: Pair) -> bool:
        """Makes one delta, and serves it when it is worth it. Returns whether that was tried."""
        key = (pair.base, pair.target)
        lack = self._lack(pair) or sealed_deltas.lack(pair, self._content_key)
        if lack:
            self._say(pair, lack)
            return False
        with writing(self._engine) as conn:
            attempts = deltas.held(conn)[key].attempts + 1
            deltas.note(conn, key, "making", now_ms=self._now_ms(), attempts=attempts, maker=__version__)
        patch = self._scratch / "patch"
        try:
            outcome = self._make(pair, patch)
            if self._stopping.is_set():
                # The child was killed for that, and nothing is said about the files.
                with writing(self._engine) as conn:
                    deltas.note(conn, key, "waiting", now_ms=self._now_ms(), attempts=attempts - 1)
                return False
            self._settle(pair, outcome, patch)
        finally:
            for leftover in self._scratch.iterdir():
                leftover.unlink(missing_ok=True)
        return True

    def _make(self, pair: Pair, patch: Path) -> patching.Outcome:
        """Of an encrypted pair's files what is in them is compared, and the delta is encrypted."""
        about = pair.sealed
        base, target = self._files.blob(pair.base), self._files.blob(pair.target)
        wanted = (pair.base, pair.target, pair.target_size)
        if about is not None:
            try:
                base, target = sealed_deltas.clear(about, pair, self._files.blob, self._scratch, self._content_key)
            except sealed_deltas.CannotRead as error:
                return patching.Outcome(code="wrong_base", detail=str(error))
            wanted = (about.base_plain, about.target_plain, about.target_size)
        outcome = patching.make_patch(
            base,
            target,
            patch,
            base_sha256=wanted[0],
            sha256=wanted[1],
            size=wanted[2],
            timeout_s=self._settings.timeout_s,
            memory_mb=self._settings.memory_mb,
            unwanted=self._stopping.is_set,
        )
        if about is None or outcome.code or self._stopping.is_set():
            return outcome
        return sealed_deltas.seal(about, pair, patch, outcome, self._content_key)

    def _say(self, pair: Pair, lack: str) -> None:
        if self._said.get((pair.base, pair.target)) == lack:
            return
        self._said[pair.base, pair.target] = lack
        with writing(self._engine) as conn:
            deltas.note(conn, (pair.base, pair.target), "waiting", now_ms=self._now_ms(), detail=lack)
        log.warning("delta not made model=%s path=%s %s", pair.model, pair.path, lack)

    def _lack(self, pair: Pair) -> str:
        """What keeps the delta from being made now; empty when nothing does."""
        for sha256, size in ((pair.base, pair.base_size), (pair.target, pair.target_size)):
            try:
                held = self._files.blob(sha256).stat().st_size
            except FileNotFoundError:
                return f"file {sha256} is not on this server"
            if held != size:
                return f"file {sha256} has {held} bytes here, wanted {size}"
        free = min(shutil.disk_usage(path).free for path in (self._scratch, self._files.blob(pair.target)))
        needed = _FREE_BYTES + 3 * pair.target_size + (pair.base_size + pair.target_size if pair.sealed else 0)
        if free < needed:
            return f"the disk has {free} bytes free, wanted {needed}"
        return ""

    def _settle(self, pair: Pair, outcome: patching.Outcome, patch: Path) -> None:
        key = (pair.base, pair.target)
        told: dict[str, Any] = {"took_s": outcome.took_s, "size": outcome.size or None}
        state: core.State = "failed"
        detail = f"{outcome.code}: {outcome.detail}"
        if not outcome.code and not core.is_worth_it(outcome.size, pair.target_size):
            state, detail = "useless", f"{outcome.size} of {pair.target_size} bytes: not worth it"
        elif not outcome.code:
            dropped = self._room_for(outcome.size)
            if dropped is None:
                detail = f"no room for {outcome.size} bytes: deltas.quota_mb is {self._settings.quota_mb}"
            else:
                self._drop(dropped)
                told["sha256"] = self._files.take(key, patch)
                state, detail = "ready", ""
        with writing(self._engine) as conn:
            deltas.note(conn, key, state, now_ms=self._now_ms(), detail=detail, **told)
        self._observe(state, outcome.took_s)
        level = logging.WARNING if state == "failed" else logging.INFO
        log.log(
            level,
            "delta state=%s model=%s from=%s to=%s path=%s bytes=%d whole_bytes=%d took_s=%.1f %s",
            state, pair.model, pair.base_version, pair.target_version, pair.path, outcome.size, pair.target_size,
            outcome.took_s, detail,
        )  # fmt: skip

    def _room_for(self, size: int) -> list[deltas.Key] | None:
        """What must go first; None when there is no room for it below the quota."""
        with reading(self._engine) as conn:
            sizes = deltas.ready_sizes(conn)
        unwanted = {key: found for key, found in sizes.items() if key not in self._wanted_now}
        taken = sum(held for held, _ in sizes.values())
        return core.to_drop(unwanted, taken + size - self._settings.quota_mb * 1_000_000)

    def _drop(self, keys: list[deltas.Key]) -> None:
        with writing(self._engine) as conn:
            deltas.forget(conn, keys)
        self._files.drop(keys)
