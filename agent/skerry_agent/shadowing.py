"""Bundles in shadow on this device: fetched, proved, and shown a share of what the serving worker answers.

The group document says which (``group.shadow_of``). A shadow costs the device nothing that serving needs: it is fetched like an update
but moves no pointer and enters no trial; it runs in a process of its own within the group's budget; whatever goes wrong with it is
reported under the event ``shadow`` and tried again after a growing wait. A bundle that cannot run here, or that dies again and
again, is left alone until the document names another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from skerry_contract import group as g
from skerry_contract import manifest as m
from skerry_contract.errors import ContractError

from skerry_agent import at_rest, facts, opening
from skerry_agent import workerwire as ww
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.core import admission, backoff, liveness
from skerry_agent.core.care import Care
from skerry_agent.downloads import Downloads
from skerry_agent.errand import Errands
from skerry_agent.errors import AgentError, Rejected, Transient
from skerry_agent.fetching import held
from skerry_agent.logs import kv
from skerry_agent.serving import SHADOW_RING, Serving
from skerry_agent.slots import Slots
from skerry_agent.workers import Worker, spawn

log = logging.getLogger(__name__)

SHADOW: tuple[str, ...] = (sys.executable, "-P", "-m", "skerry_agent.worker.shadow")
_START_S = 180.0
_MOST_FAILURES = 5
"""In a row; a shadow that lived ``_STEADY_S`` begins anew."""
_STEADY_S = 600.0
_FEED_BYTES = 1 << 16
"""What the kernel holds of a feed: little, so that a shadow that is behind is not shown what was asked long ago."""

Admission = Callable[[m.Manifest, str], admission.Admit | admission.Refuse]


@dataclass(kw_only=True, slots=True)
class _Shadow:
    """One model's.

    Attributes:
        fed: process of the serving worker that shows its requests; 0 for none.
        failures: in a row; awaited: looks in a row for what was not to be had yet.
        code, detail: why it does not run.
        runs_on, fallback: see ``workerwire.Proved``.
        care: of its process.
    """

    model: str
    target: g.Target
    settings: tuple[float, float, float]
    worker: Worker | None = None
    ready: asyncio.Future[None] | None = None
    ring: str = ""
    fed: int = 0
    since_s: float = 0.0
    failures: int = 0
    awaited: int = 0
    code: str = ""
    detail: str = ""
    rss_mb: float = 0.0
    runs_on: tuple[str, ...] = ()
    fallback: str = ""
    care: Care | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Shadowing:
    """The shadows of this agent.

    Args:
        admission: may a bundle run here, now, and as which variant?
        errand_input: fields that every courier gets.
        downloads: how files come.
        on_event: takes (code, data) of the event ``shadow``.
    """

    def __init__(
        self,
        config: Config,
        slots: Slots,
        serving: Serving,
        errands: Errands,
        clock: Clock,
        *,
        admission: Admission,
        downloads: Downloads,
        errand_input: Callable[[], dict[str, Any]],
        on_event: Callable[[str, dict[str, Any]], None],
        draw: Callable[[], float],
    ) -> None:
        self._config = config
        self._slots = slots
        self._serving = serving
        self._errands = errands
        self._clock = clock
        self._admission = admission
        self._downloads = downloads
        self._errand_input = errand_input
        self._on_event = on_event
        self._draw = draw
        self._shadows: dict[str, _Shadow] = {}
        self._ended: set[asyncio.Task[None]] = set()

    # --- what should be ----------------------------------------------------------------------------------------------

    def follow(self, wanted: Mapping[str, g.Target], settings: g.Settings) -> None:
        """Starts, ends and replaces shadows so that they are as the document says."""
        budget = (settings.shadow_share, settings.shadow_cpu, settings.shadow_c)
        for model, shadow in list(self._shadows.items()):
            target = wanted.get(model)
            if target is None or (target, budget) != (shadow.target, shadow.settings):
                self._end(self._shadows.pop(model))
        for model, target in wanted.items():
            if model not in self._shadows:
                shadow = self._shadows[model] = _Shadow(model=model, target=target, settings=budget)
                shadow.task = asyncio.get_running_loop().create_task(self._live(shadow), name=f"shadow-{model}")
        self._slots.kept = {shadow.target.digest for shadow in self._shadows.values()}

    def tick(self) -> None:
        """Shows each shadow what answers now: after a hand-over, or a crash, that is another worker."""
        for shadow in self._shadows.values():
            if shadow.worker is not None and shadow.worker.alive and shadow.ready is not None and shadow.ready.done():
                self._look_after(shadow, shadow.worker)
                self._feed(shadow)

    def _look_after(self, shadow: _Shadow, worker: Worker) -> None:
        timing = self._config.timing
        limits = liveness.Limits(
            silent_s=timing.silent_s, inference_s=timing.inference_s, interval_s=timing.health_interval_s
        )
        care = shadow.care
        if care is not None and care.look(self._clock.boot_s(), limits):
            told = kv(model=shadow.model, pid=worker.pid, code=care.code, detail=care.detail)
            log.error("shadow is ended", extra=told)
            worker.kill()

    def sample(self) -> None:
        """The share of answers that are kept changed: tells it."""
        for shadow in self._shadows.values():
            if shadow.worker is not None and shadow.worker.alive:
                shadow.worker.send(ww.Sample(rules=self._rules()))

    def _rules(self) -> ww.SamplingRules:
        site = self._serving.site
        return at_rest.sampling_rules(self._config, site.sample_rate, site.rings.kept_this_hour())

    def status(self) -> dict[str, Any]:
        """By model, as ``skerry-agent status`` shows it."""
        return {
            shadow.model: {
                "digest": shadow.target.digest,
                "version": shadow.target.version,
                "running": self._is_shown(shadow),
                "pid": shadow.worker.pid if shadow.worker is not None and shadow.worker.alive else 0,
                "rss_mb": shadow.rss_mb,
                "runs_on": shadow.runs_on,
                "fallback": shadow.fallback,
                "code": shadow.code,
                "detail": shadow.detail,
                "failures": shadow.failures,
            }
            for shadow in self._shadows.values()
        }

    def _is_shown(self, shadow: _Shadow) -> bool:
        generation = self._serving.generation_of(shadow.model)
        alive = shadow.worker is not None and shadow.worker.alive and self._serving.answering(shadow.model)
        return alive and generation is not None and generation.worker.pid == shadow.fed

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Asks the shadows for what they have counted; waits a moment for it."""
        living = [s.worker for s in self._shadows.values() if s.worker is not None and s.worker.alive]
        for worker in living:
            worker.send(ww.Flush(id=0))
        if living:
            await asyncio.sleep(min(0.2, timeout_s))

    async def stop(self) -> None:
        """Ends all; what they counted is taken in first."""
        for shadow in self._shadows.values():
            self._end(shadow)
        self._shadows.clear()
        await asyncio.gather(*self._ended, return_exceptions=True)

    # --- one shadow's life -------------------------------------------------------------------------------------------

    async def _live(self, shadow: _Shadow) -> None:
        while True:
            here = False
            try:
                variant = await self._have(shadow)
                here, shadow.awaited = True, 0
                await self._run(shadow, variant)
            except (Rejected, ContractError) as error:
                # Of the bundle or of this device: another try would end as this one.
                self._failed(shadow, error.code, error.detail if isinstance(error, AgentError) else str(error))
                return
            except (AgentError, OSError) as error:
                code = error.code if isinstance(error, AgentError) else "storage_failed"
                self._failed(shadow, code, str(error), counts=here)
            if shadow.failures >= _MOST_FAILURES:
                log.error("shadow given up", extra=kv(model=shadow.model, digest=shadow.target.digest))
                return
            cause = "worker" if shadow.code in ("runtime_crashed", "worker_hung", "worker_leaked") else "sync"
            wait_s = backoff.delay_s(
                cause, max(1, shadow.failures + shadow.awaited), self._draw(), scale=self._config.timing.backoff_scale
            )
            await asyncio.sleep(wait_s)

    def _failed(self, shadow: _Shadow, code: str, detail: str, *, counts: bool = True) -> None:
        """``counts``: not for want of a network, of its hours or of room: whatever waits for that is never given up."""
        known = shadow.code == code
        shadow.failures += counts
        shadow.awaited += not counts
        shadow.code, shadow.detail = code, detail[:500]
        log.warning("shadow", extra=kv(model=shadow.model, code=code, detail=detail, failures=shadow.failures))
        if not known or (counts and shadow.failures == _MOST_FAILURES):
            self._tell(shadow)

    def _tell(self, shadow: _Shadow) -> None:
        target = shadow.target
        self._on_event(
            shadow.code,
            {
                "model": shadow.model, "digest": target.digest, "version": target.version, "detail": shadow.detail,
                "failures": shadow.failures,
            },
        )  # fmt: skip

    async def _have(self, shadow: _Shadow) -> m.Variant:
        """Its files, checked, in a slot. Raises as the courier and the slots do, ``Rejected`` when it may not run here."""
        target = shadow.target
        manifest = self._slots.manifest(target.digest)
        text = ""
        if manifest is None:
            wanted = {"model": shadow.model, "version": target.version, "digest": target.digest}
            answer = await self._errands.run(
                "manifest", {**self._errand_input(), **wanted}, timeout_s=self._config.timing.courier_s
            )
            text = str(answer.get("manifest", ""))
            if m.digest(text.encode()) != target.digest:
                raise Rejected("hash_mismatch", f"manifest: wanted {target.digest}")
            manifest = m.parse(text.encode())
        if (manifest.model, manifest.version) != (shadow.model, target.version):
            raise Rejected(
                "malformed_manifest", f"wanted {shadow.model} {target.version}, got {manifest.model} {manifest.version}"
            )
        if manifest.streams is not None:
            raise Rejected("shadow_stateful", "its answers depend on requests that a shadow does not see")
        found = self._admission(manifest, target.digest)
        if isinstance(found, admission.Refuse):
            # Memory and disk may be free again later; the rest is as it is.
            passing = found.code in ("not_enough_memory", "not_enough_disk")
            raise Transient(found.code, found.detail) if passing else Rejected(found.code, found.detail)
        variant = manifest.variant(found.variant)
        if not self._slots.whole(target.digest, variant.id):
            await self._downloads.run(
                {
                    **self._errand_input(),
                    **facts.reserves(self._config),
                    "digest": target.digest,
                    "manifest": text or (self._slots.path(target.digest) / m.MANIFEST_FILE).read_text(),
                    "files": [{"path": f.path, "sha256": f.sha256, "size": f.size} for f in variant.files],
                    "variant": variant.id,
                    "held": held(self._slots, shadow.model),
                    "opened": opening.for_download(self._config, self._slots, manifest),
                }
            )
            await asyncio.to_thread(self._slots.verify, target.digest, variant.files)
            await asyncio.to_thread(self._slots.stage, target.digest)
        return variant

    async def _run(self, shadow: _Shadow, variant: m.Variant) -> None:
        """From its start to its end. Raises ``Rejected`` when it cannot be proved, ``Transient`` when it died."""
        shadow.ring = f"{SHADOW_RING}{secrets.token_hex(8)}-{shadow.model}"
        shadow.ready = asyncio.get_running_loop().create_future()
        shadow.fed = 0
        await self._serving.site.open_bundles([(shadow.target.digest, variant.id)])
        shadow.worker = await spawn((), lambda message, fd: self._take(shadow, message, fd), command=SHADOW)
        worker = shadow.worker
        care = shadow.care = Care(needs_mb=variant.needs.rss_mb, slack_mb=self._config.limits.leak_slack_mb)
        target = shadow.target
        _, cpu, max_c = shadow.settings
        worker.send(
            ww.StartShadow(
                candidate=ww.Served(
                    name=shadow.model, version=target.version, digest=target.digest, variant=variant.id,
                    path=str(self._slots.load_path(target.digest)), ring=shadow.ring,
                ),
                cpu=cpu, max_c=max_c, boot_id=self._clock.boot_id,
                fold_interval_s=self._config.timing.fold_interval_s or self._serving.site.window_s,
                health_interval_s=self._config.timing.health_interval_s,
                acceleration=self._config.runtime.acceleration,
                sampling=self._rules(),
            )
        )  # fmt: skip
        try:
            either: set[asyncio.Future[Any]] = {shadow.ready, worker.exited}
            await asyncio.wait(either, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
            if not shadow.ready.done():
                gone = worker.exited.done()
                raise Transient("runtime_crashed" if gone else "start_timeout", "it did not come up")
            shadow.ready.result()
            shadow.code = shadow.detail = ""
            shadow.since_s = self._clock.boot_s()
            log.info("shadow up", extra=kv(model=shadow.model, version=target.version, pid=worker.pid))
            self._feed(shadow)
            code = await asyncio.shield(worker.exited)
        finally:
            await asyncio.shield(self._leave(worker, shadow.ring))
        if self._clock.boot_s() - shadow.since_s >= _STEADY_S:
            shadow.failures = 0
        if care.code:
            raise Transient(care.code, care.detail)
        raise Transient("runtime_crashed", f"signal {-code}" if code < 0 else f"exit code {code}")

    async def _leave(self, worker: Worker, ring: str) -> None:
        await worker.end(grace_s=2.0)
        self._serving.site.rings.remove(ring)

    def _end(self, shadow: _Shadow) -> None:
        generation = self._serving.generation_of(shadow.model)
        if shadow.fed and generation is not None and generation.worker.pid == shadow.fed:
            generation.worker.send(ww.Feed(model=shadow.model))
        task = shadow.task
        if task is not None:
            task.cancel()
            self._ended.add(task)
            task.add_done_callback(self._ended.discard)

    # --- between the two ---------------------------------------------------------------------------------------------

    def _feed(self, shadow: _Shadow) -> None:
        """Joins the serving worker and the shadow by a socket, once per serving worker."""
        generation = self._serving.generation_of(shadow.model)
        if generation is None or shadow.model not in generation.models or not generation.worker.alive:
            return
        if generation.worker.pid == shadow.fed or generation.models[shadow.model].digest == shadow.target.digest:
            return
        assert shadow.worker is not None
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            log.warning("shadow not fed", extra=kv(model=shadow.model, detail=str(error)))
            return
        with contextlib.closing(ours), contextlib.closing(theirs):
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _FEED_BYTES)
            shadow.worker.send(ww.Feed(model=shadow.model), theirs.fileno())
            generation.worker.send(ww.Feed(model=shadow.model, share=shadow.settings[0]), ours.fileno())
        shadow.fed = generation.worker.pid

    def _take(self, shadow: _Shadow, message: Any, fd: int | None) -> None:
        ready = shadow.ready
        match message:
            case ww.Ready() if ready is not None and not ready.done():
                shadow.runs_on, shadow.fallback = message.models[0].runs_on, message.models[0].fallback
                if shadow.care is not None:
                    shadow.care.begin(self._clock.boot_s(), base_mb=message.base_mb, ready_mb=message.own_mb)
                ready.set_result(None)
            case ww.Failed() if ready is not None and not ready.done():
                ready.set_exception(Rejected(message.code, message.detail, model=message.model))
            case ww.WindowCut() if shadow.worker is not None:
                self._serving.site.rings.commit(shadow.worker, message)
            case ww.Sampled():
                self._serving.site.rings.sampled(message)
            case ww.Health():
                shadow.rss_mb = message.rss_mb
                if shadow.care is not None:
                    shadow.care.hear(
                        self._clock.boot_s(),
                        own_mb=message.own_mb,
                        busy_s=message.busy_s,
                        expected_s=message.expected_s,
                    )
            case _:
                pass
        if fd is not None:
            os.close(fd)
