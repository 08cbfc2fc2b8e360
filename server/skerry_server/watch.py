"""The loop that looks for drift: which bundles have counted something, ask ``core.drift``, write what it opens and closes.

A loop of its own, so that many features do not delay a rollout. It never dies of one bundle: what fails is logged and looked at
again with the next bucket. A look depends on stored buckets only, so a restart repeats it with the same result.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import msgspec
from sqlalchemy import Engine

from skerry_server import findings, profiles
from skerry_server.config import Drift
from skerry_server.core.drift import Limits
from skerry_server.db.engine import reading, writing

log = logging.getLogger(__name__)

_LEAST_TICK_S = 1.0


class DriftWatch:
    """Runs in a thread of its own."""

    def __init__(self, engine: Engine, settings: Drift, bucket_s: float, now_ms: Callable[[], int]) -> None:
        """Starts nothing yet.

        Args:
            bucket_s: length of a bucket; a look follows each.
            now_ms: the server's clock.
        """
        wishes = {name: getattr(settings, name) for name in settings.__struct_fields__ if name != "lookback_s"}
        self._engine = engine
        self._limits = msgspec.structs.replace(Limits(), **wishes)
        self._lookback_ms = round(settings.lookback_s * 1000)
        self._bucket_ms = round(bucket_s * 1000)
        self._tick_s = max(_LEAST_TICK_S, bucket_s / 2)
        self._now_ms = now_ms
        self._looked_ms = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins looking."""
        self._thread = threading.Thread(target=self._run, name="drift-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the bundle under way."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.tick()
            except Exception:
                log.exception("drift watch failed")
            self._stopping.wait(self._tick_s)

    def tick(self) -> int:
        """Looks at every bundle that may have changed; returns how many findings it opened and closed."""
        now_ms = self._now_ms()
        # A bucket is looked at once it has ended, which may be long after its last window came.
        since_ms = max(self._looked_ms, now_ms - self._lookback_ms) - 2 * self._bucket_ms
        with reading(self._engine) as conn:
            due = findings.due(conn, since_ms)
        changed = 0
        for bundle in due:
            if self._stopping.is_set():
                break
            try:
                changed += self._look(bundle, now_ms)
            except Exception:
                log.exception("drift look failed bundle=%s", bundle)
        self._looked_ms = now_ms
        return changed

    def _look(self, bundle: str, now_ms: int) -> int:
        with reading(self._engine) as conn:
            manifest = profiles.manifest_of(conn, bundle)
            served = manifest is not None and findings.served(conn, bundle)
            if served and manifest is not None:
                evaluation = findings.look(
                    conn, bundle, manifest, self._limits, lookback_ms=self._lookback_ms, now_ms=now_ms
                )
        with writing(self._engine) as conn:
            if not served or manifest is None:
                return findings.close_unserved(conn, bundle, now_ms=now_ms)
            changes = findings.store(conn, bundle, manifest.model, evaluation, now_ms=now_ms)
        for change in changes:
            log.info("drift model=%s bundle=%s %s", manifest.model, bundle[:12], change)
        return len(changes)
