"""The supervisor: the only loop. It puts the parts together, and tells each what the others found.

It imports neither numpy nor tuf nor cryptography. Models run in workers (``serving``), updates run by the table
(``updating``), the network is a doorbell (``uplink``): a bell or the timer starts a sync (``syncing``), the courier verifies,
``core.plan`` says what follows (``following``). Nothing here waits for the network: without one the confirmed bundles serve.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import resource
import secrets
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]  # ships no types

from skerry_agent import at_rest, facts, hold, logs, opening, reloading, reporting, wear
from skerry_agent import workerwire as ww
from skerry_agent.applications import Applications
from skerry_agent.asked_logs import AskedLogs
from skerry_agent.chronicle import Chronicle
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.control import Answer, ControlServer
from skerry_agent.core import culprits, liveness
from skerry_agent.diversity import Diversity
from skerry_agent.downloads import Downloads
from skerry_agent.errand import COURIER, Errands
from skerry_agent.errors import AgentError, BadConfig, Degraded
from skerry_agent.following import Following
from skerry_agent.forcing import Forcing
from skerry_agent.holding import Holding
from skerry_agent.identity import identity
from skerry_agent.importing import Importing
from skerry_agent.leftovers import Roll
from skerry_agent.link import Rang
from skerry_agent.logring import LogRing
from skerry_agent.logs import kv
from skerry_agent.network import CODES as DOWNLOADS_WAIT
from skerry_agent.network import Networks
from skerry_agent.notify import Notify
from skerry_agent.obeying import Obeying
from skerry_agent.operating import Operating
from skerry_agent.orders import Orders
from skerry_agent.pulse import Pulse
from skerry_agent.remembered import Remembered
from skerry_agent.restarts import Restarts
from skerry_agent.restoring import Restoring
from skerry_agent.runtimes import Runtimes
from skerry_agent.serving import Generation, Serving
from skerry_agent.shadowing import Shadowing
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import open_store
from skerry_agent.syncing import Syncing
from skerry_agent.throttle import Throttle
from skerry_agent.unstarted import Unstarted
from skerry_agent.updating import TrialRules, Updating
from skerry_agent.uplink import Uplink
from skerry_agent.workers import WORKER

log = logging.getLogger(__name__)

_TICK_S = 0.5


class Supervisor:
    """One agent. ``run`` is its life; the rest answers events.

    Args:
        config: the frozen tree.
        environment: for the service manager's sockets.
        courier_command, worker_command: what to run as courier and worker.
        plain_mqtt: no TLS; for tests on loopback.
        ring: what the log's last lines are kept in.
        config_path: the file that ``config`` was read from, to be read again when asked.

    Raises:
        Degraded: not enrolled, or the state folder cannot be used.
    """

    def __init__(
        self,
        config: Config,
        environment: Mapping[str, str],
        *,
        courier_command: Sequence[str] = COURIER,
        worker_command: Sequence[str] = WORKER,
        plain_mqtt: bool = False,
        config_path: Path | None = None,
        ring: LogRing | None = None,
    ) -> None:
        self._config = config
        self._config_path = config_path
        self._environment = environment
        self._identity = identity(config)
        config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        config.run_dir.mkdir(exist_ok=True, mode=0o700)
        self._draw = random.SystemRandom().random
        self._clock = Clock()
        self._lock = hold.lock(config)
        at_rest.prepare(config)
        self._store, self._opened = open_store(
            config.state_dir / "state.db",
            binding=facts.binding(self._identity),
            device=self._identity.device,
            new_epoch=lambda: secrets.token_hex(16),
            wall_s=self._clock.wall_s(),
            bound_bytes=int(config.limits.outbox_mb * 1e6),
            files_bound_bytes=int(config.limits.outbox_mb * 1e6),
            free_bytes=int(config.limits.outbox_free_mb * 1e6),
        )
        self._note_boot()
        self._restarts = Restarts(self._store, self._clock, scale=config.timing.backoff_scale)
        self._remembered = Remembered(self._store, self._clock, config.state_dir)
        self._slots = Slots(config.state_dir / "slots", opening.folder_of(config))
        self._runtimes = Runtimes(config, self._clock, self._draw)
        self._stratum = facts.stratum(config, self._runtimes.usable)
        self._orders = Orders(self._store, self._identity.group)
        self._errands = Errands(courier_command)
        self._uplink = Uplink(
            config, self._identity, self._store, self._clock, state=lambda: reporting.state(self._snapshot()),
            on_bell=self._rang, on_fault=self._fault, draw=self._draw, plain_mqtt=plain_mqtt,
        )  # fmt: skip
        self._asked_logs = AskedLogs(
            self._errands, ring, errand_input=self._errand_input, timeout_s=config.timing.courier_s, draw=self._draw,
            scale=config.timing.backoff_scale,
        )  # fmt: skip
        self._syncing = Syncing(
            config, self._store, self._slots, self._clock, self._errands, self._uplink, self._orders, self._asked_logs,
            self._remembered, errand_input=self._errand_input, on_document=self._apply_settings, on_orders=self._ordered,
            on_synced=self._follow_plan, on_failed=self._follow_folder, on_fault=self._fault, device=self._identity.device, draw=self._draw,
        )  # fmt: skip
        self._chronicle = Chronicle(self._store, self._slots, self._runtimes, on_event=self._uplink.event)
        self._notify = Notify(environment)
        roll = Roll(config.run_dir / "workers.json", self._clock.boot_id)
        self._listener = hold.bind(config, roll, self._clock)
        self._local = hold.bind_local(config, roll, self._clock)
        listeners: list[socket.socket] = []
        self._address: dict[str, Any] = {}
        if self._listener is not None:
            listeners.append(self._listener)
            self._address["host"], self._address["port"] = self._listener.getsockname()[:2]
        if self._local is not None:
            listeners.append(self._local.socket)
            self._address["socket"] = str(self._local.path)
        self._serving = Serving(
            config, self._store, self._slots, self._clock, listeners, roll, on_health=self._health, on_crash=self._crash,
            on_unruly=self._unruly, on_start=self._started, on_records=self._uplink.pump_soon, on_fault=self._fault, draw=self._draw, worker_command=worker_command,
        )  # fmt: skip
        self._serving.site.open_bundles = opening.Opening(
            config, self._slots, self._errands, errand_input=self._errand_input
        ).ensure
        self._throttle = Throttle(self._store, self._clock, self._serving.throttle)
        self._holding = Holding(
            config,
            self._store,
            self._slots,
            self._clock,
            windows=lambda: self._orders.settings.windows,
            opens_at=self._orders.opens_at,
        )
        self._applications: Applications | None = None
        if config.apps.clients:
            self._applications = Applications(
                config, self._store, self._slots, self._clock, self._serving.site.rings,
                window_s=lambda: self._orders.settings.window_s, on_event=self._uplink.event, device=self._identity.device,
                holding=self._holding,
            )  # fmt: skip
        self._restoring = Restoring(self._slots, self._serving, on_damage=self._damaged)
        self._networks = Networks(
            config, self._clock, wanted=lambda: self._orders.settings.networks, carried=lambda digest: bool(digest) and self._importing.brings(digest),
            windows=lambda: self._orders.settings.fetch_windows,
        )  # fmt: skip
        self._updating = Updating(
            config, self._store, self._slots, self._serving, self._errands, self._clock, self._runtimes,
            self._restoring, self._holding, self._networks, errand_input=self._update_input, on_change=self._uplink.changed,
            on_progress=self._uplink.report_if_online, on_rest=self._rested,
            on_fault=self._fault, draw=self._draw,
        )  # fmt: skip
        self._importing = Importing(
            config, self._store, self._syncing, self._updating, ready=lambda: self._booted and not self._stop.is_set(),
            on_event=self._uplink.event, running=lambda: reporting.running(self._snapshot()), document=lambda: self._orders.document,
        )  # fmt: skip
        self._obeying = Obeying(self._store, self._updating, on_event=self._uplink.event)
        self._diversity = Diversity(
            self._clock, most=lambda: self._config.access.distinct_most, on_event=self._uplink.event
        )
        self._unstarted = Unstarted(
            on_event=self._uplink.event, on_damage=self._restoring.look_at_files, go_back=self._updating.go_back
        )
        self._serving.site.on_not_started = self._unstarted.failed
        self._shadowing = Shadowing(
            config, self._slots, self._serving, self._errands, self._clock, admission=self._updating.fetching.admission, errand_input=self._update_input,
            downloads=Downloads(self._errands, self._clock, self._networks, max_kib_s=lambda: self._updating.rules.max_kib_s),
            on_event=lambda code, data: self._uplink.event("shadow", code, data), draw=self._draw,
        )  # fmt: skip
        self._following = Following(
            self._identity, self._store, self._slots, self._clock, self._runtimes, self._serving, self._orders,
            self._updating, self._shadowing, stratum=self._stratum,
            ready=lambda: self._booted and not self._stop.is_set() and not self._forcing.comes_first, on_event=self._uplink.event, ask_sync=self.sync,
        )  # fmt: skip
        self._forcing = Forcing(self._remembered, self._slots, self._serving, self._updating, self._clock)
        self._pulse = Pulse(
            self._notify, self._clock, self._address, should_answer=self._should_answer,
            store_failed=lambda: self._ended is not None, unserved_s=lambda: self._config.timing.unserved_s,
        )  # fmt: skip
        self._operating = Operating(
            self._serving, self._updating, self._shadowing, self._throttle, self._holding, snapshot=self._snapshot, ask_sync=self.sync,
            reload=self._reload, ring=ring, restarts=lambda: self._restarts.in_a_row, unstarted=self._unstarted.last,
            importing=self._importing, lacks=self._following.lacks,
        )  # fmt: skip
        self._stop = asyncio.Event()
        self._ended: Degraded | None = None
        self._answers: list[bool] = []
        self._booted = False
        self._started_s = self._clock.boot_s()

    # --- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Runs until SIGTERM or SIGINT. Returns the exit code: 0, or 1 when the store failed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        _write(self._config.run_dir / "supervisor.pid", f"{os.getpid()}\n".encode())
        _write(self._config.run_dir / "serving.json", msgspec.json.encode(self._address))
        control = ControlServer(
            self._config.run_dir / "control.sock",
            self._operating.routes(),
        )
        await control.start()
        self._note_opening()
        self._orders.recall()
        await self._boot()
        if self._applications is not None:
            self._applications.start()
        self._uplink.start(self._orders.group)
        tasks = [loop.create_task(self._syncing.run(), name="sync"), loop.create_task(self._tick_loop(), name="tick")]
        self._notify.tell("READY=1")
        log.info("agent up", extra=kv(device=self._identity.device, **self._address, epoch=self._store.epoch))
        stopped = loop.create_task(self._stop.wait())
        done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
        self._notify.tell("STOPPING=1")
        if self._ended is None:
            self._restarts.ended()
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)
        await self._importing.stop()
        await self._updating.stop(in_order=self._stop.is_set() and self._ended is None)
        await self._shadowing.stop()
        await self._asked_logs.stop()
        if self._applications is not None:
            self._applications.stop()
        await self._serving.stop()
        await self._uplink.stop()
        await control.stop()
        if self._listener is not None:
            self._listener.close()
        if self._local is not None:
            self._local.close()
        self._store.close()
        for task in done:
            if task is not stopped and not task.cancelled() and task.exception() is not None:
                raise task.exception() or RuntimeError(task.get_name())
        return 1 if self._ended is not None else 0

    def _note_boot(self) -> None:
        try:
            self._store.note_boot(self._clock.boot_id)
        except Degraded as error:
            # A full disk, say: the wall clock places this boot, as far as it can.
            log.warning("boot not noted", extra=kv(code=error.code, detail=error.detail))

    def _note_opening(self) -> None:
        opened = self._opened
        if opened.new_epoch in ("moved", "damaged"):
            log.warning("new epoch", extra=kv(why=opened.new_epoch, moved_aside=opened.moved_aside))
            data = {
                "why": opened.new_epoch, "epoch": self._store.epoch, "lost_records": opened.lost_records,
                "lost_inferences": opened.lost_inferences,
            }  # fmt: skip
            self._uplink.event("epoch", "store_damaged" if opened.new_epoch == "damaged" else "", data)

    async def _boot(self) -> None:
        self._updating.turnover.finish()
        models, complaints = self._slots.boot()
        for complaint in complaints:
            log.error("slot unusable", extra=kv(detail=complaint))
            self._uplink.event("slot", "model_damaged", {"detail": complaint})
        # What lies ready did not begin: it is not to blame, nor does it shield what runs.
        update = self._updating.update
        if self._restarts.began(at_rest=update.resting or update.state == "ready"):
            self._updating.blame(
                f"the agent itself ended {self._restarts.in_a_row} times in a row soon after its start"
            )
        await self._updating.booted_and_told()
        self._apply_settings()
        error = await self._updating.come_up(models, timeout_s=180.0) if models else None
        if error is not None:
            log.error("confirmed bundles do not start", extra=kv(code=error.code, detail=error.detail))
            self._uplink.event("worker", error.code, {"detail": error.detail})
        self._booted = True
        if self._importing.active or any(self._following.must_be_replaced(name, slot) for name, slot in models.items()):
            # What to run instead may be here, and the network may not.
            self._follow_plan()

    def _damaged(self, model: str, slot: Slot, detail: str) -> None:
        log.error("slot damaged", extra=kv(model=model, version=slot.version, digest=slot.digest, detail=detail))
        self._uplink.event("slot", "model_damaged", {"model": model, "digest": slot.digest, "detail": detail[:500]})
        # Whoever may fetch it again looks now.
        self.sync()

    async def _tick_loop(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._serving.tick()
            self._updating.tick()
            if self._networks.opened():
                for code in DOWNLOADS_WAIT:
                    self._updating.failures.hurry(code)
                self._follow_plan()
            self._forcing.tick()
            self._restarts.tick()
            self._shadowing.tick()
            self._throttle.tick()
            if self._applications is not None:
                self._applications.tick()
            self._chronicle.serves(self._serving.models())
            self._uplink.pump()
            if self._runtimes.try_again():
                self._uplink.changed("", {})
                self.sync()
            answers = [self._serving.answering(model) for model in self._serving.models()]
            if answers != self._answers:
                # A worker died, or is back: the server must not hold the one for the other until the next sync.
                self._answers = answers
                self._uplink.changed("", {})
            self._pulse.tick()

    def _should_answer(self) -> bool:
        # What is loaded on demand is no one's to wake but an application's.
        awake = not all(cell.resting for cell in self._serving.cells.values())
        here = any(self._slots.answering(model) is not None for model in self._slots.models())
        return self._booted and here and (awake or not self._serving.cells)

    def _reload(self) -> Answer:
        """Reads the configuration again: SIGHUP, or a person's wish."""
        if self._config_path is None:
            return Answer(409, {"error": "this agent was not started from a file", "code": "no_file"})
        self._notify.reloading()
        try:
            config, changes = reloading.read_again(self._config, self._config_path, self._environment)
        except BadConfig as error:
            log.error("configuration not taken", extra=kv(faults="; ".join(error.faults)))
            self._notify.tell("READY=1", f"STATUS=configuration not taken: {error.faults[0]}")
            return Answer(409, {"error": "; ".join(error.faults), "code": "bad_config", "faults": error.faults})
        status = "STATUS=configuration not taken whole, the log says why"
        try:
            self._config = config
            for part in (
                self._serving,
                self._updating,
                self._holding,
                self._networks,
                self._syncing,
                self._importing,
                self._applications,
            ):
                if part is not None:
                    part.configure(config)
            self._store.bound_bytes = self._store.files_bound_bytes = int(config.limits.outbox_mb * 1e6)
            logs.configure(as_json=config.log.json, level=config.log.level)
            self._apply_settings()
            status = "STATUS="
        finally:
            # A manager that waits for it would wait for ever.
            self._notify.tell("READY=1", status)
        self.sync()
        return Answer(200, {"live": changes.live, "next_worker": changes.next_worker, "restart": changes.restart})

    def _fault(self, error: Degraded) -> None:
        # Crash-only: the next start moves the file aside and goes on; the rings keep what was not committed.
        log.critical("store failed", extra=kv(code=error.code, detail=error.detail, advice=error.advice))
        self._store.mark_suspect()
        self._ended = error
        self._stop.set()

    def sync(self) -> None:
        """Asks for a sync soon."""
        self._syncing.ask()

    def _ordered(self, orders: object) -> None:
        if self._obeying.told(orders):
            self._syncing.renew_soon()

    def _rang(self, bell: Rang) -> None:
        self._syncing.rang(bell)

    def _follow_plan(self) -> None:
        self._forcing.recall()
        self._forcing.tick()
        self._following.look()
        # A wait of what it brought may be over, and nothing have followed.
        self._importing.rested()

    def _follow_folder(self) -> None:
        # What a person carried here and waits for its next try waits for no network.
        if self._importing.active:
            self._follow_plan()

    def _rested(self) -> None:
        self._following.look()
        self._importing.rested()

    def _apply_settings(self) -> None:
        timing, settings = self._config.timing, self._orders.settings
        rules = TrialRules(
            duration_s=timing.trial_s if timing.trial_s >= 0 else settings.trial_s,
            inferences=timing.trial_inferences if timing.trial_inferences >= 0 else settings.trial_inferences,
            max_kib_s=settings.max_kib_s,
        )
        self._updating.apply(rules)
        self._serving.site.window_s = settings.window_s
        if self._serving.sample(settings.sample_rate):
            self._shadowing.sample()

    # --- workers -----------------------------------------------------------------------------------------------------

    def _started(self, models: Mapping[str, Slot], error: AgentError | None, proofs: Mapping[str, ww.Proved]) -> None:
        if error is None:
            self._unstarted.started(models)
        news, missing = self._chronicle.started(models, error, proofs)
        if missing:
            asyncio.get_running_loop().call_soon(self._follow_plan)
            self.sync()
        if news:
            self._uplink.changed("", {})

    def _health(self, generation: Generation) -> None:
        if generation.health is not None:
            self._diversity.take(generation.health.clients)
        self._updating.judge()

    def _crash(self, generation: Generation, code: int) -> bool:
        how = generation.hung or (f"signal {-code}" if code < 0 else f"exit code {code}")
        if not generation.unruly:
            self._chronicle.ended(generation, "worker_hung" if generation.hung else "runtime_crashed", how)
        apart = set(self._serving.site.apart)
        again = not self._updating.crashed(generation, how)
        for name, slot in generation.models.items():
            if slot.digest in self._serving.site.apart - apart:
                self._chronicle.set_apart(name, slot, how)
        return again

    def _unruly(self, generation: Generation, found: liveness.Unruly) -> bool:
        self._chronicle.ended(generation, found.code, found.detail)
        return self._updating.unruly(generation, found)

    # --- what is said of us ------------------------------------------------------------------------------------------

    def _errand_input(self) -> dict[str, Any]:
        return {
            "state_dir": str(self._config.state_dir),
            "server_url": self._identity.server_url,
            "repository_url": self._identity.repository_url,
            "lower_bound_s": self._clock.lower_bound_s,
            "lower_bound_keys": list(self._remembered.bound_keys),
            "now_s": self._clock.wall_s(),
            "encryption_key": self._config.encryption.key,
            "opened": str(self._slots.opened or ""),
        }

    def _update_input(self) -> dict[str, Any]:
        return {**self._errand_input(), **self._importing.fields()}

    def _snapshot(self) -> reporting.Snapshot:
        pending, pending_bytes = self._store.pending()
        serving = self._serving
        workers = [reporting.worker(generation) for generation in serving.generations()]
        charges = culprits.charges(self._updating.crashes, self._clock.boot_s())
        suspects = {model: n for (model, _), n in charges.items()}
        return reporting.Snapshot(
            device=self._identity.device, group=self._orders.group, birth=self._uplink.link.birth,
            generation=self._orders.document.generation if self._orders.document else 0, boot_id=self._clock.boot_id,
            epoch=self._store.epoch, seq=self._store.last_seq, stratum=self._stratum, arch=facts.arch(),
            abilities=tuple(sorted(facts.ABILITIES)), runtimes=self._runtimes.usable, tuf=dict(self._store.get("tuf", {})),
            models=serving.models(), stopped=frozenset(m for m in serving.models() if not serving.answering(m)), update=self._updating.update,
            lost=self._store.lost(), linked=self._uplink.link.connected,
            server_online=self._uplink.server_online, pending=pending,
            pending_bytes=pending_bytes, pending_inferences=self._store.pending_inferences(),
            serving={**self._address, "inflight": sum(one.inflight for one in workers), "throttle": self._throttle.status()},
            sync=self._syncing.status(), rss_mb=psutil.Process().memory_info().rss / 1e6, workers=tuple(workers),
            worker_ends=self._chronicle.ends(), suspects=suspects, requests_refused=serving.passing.refused,
            requests_waited=serving.passing.waited, spare_pid=serving.site.spare.pid, on_demand=serving.on_demand(), clients=self._diversity.counts(),
            fetching=self._updating.fetching.progress.now, fetched=self._updating.fetching.progress.status(),
            swaps=dict(self._chronicle.swaps), written_mb=wear.written_mb([os.getpid(), *(one.pid for one in workers)]),
            applications=self._applications.report() if self._applications is not None else {}, uptime_s=self._clock.boot_s() - self._started_s,
            now_ms=int(self._clock.now_s() * 1000),
        )  # fmt: skip


def _raise_descriptors() -> None:
    """As many descriptors as this process may have, and its workers after it: each open connection of an application is one.

    The usual soft limit of 1024 is for programs that use ``select``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.warning("limit of descriptors not raised", extra=kv(soft=soft, hard=hard, detail=str(error)))


def _write(path: Any, data: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        # A full disk, say. Who looks for it there does not find it; what serves is worth more.
        log.error("file not written", extra=kv(path=str(path), detail=str(error)))


def run(config: Config, environment: Mapping[str, str], **choices: Any) -> int:
    """Runs an agent in this process. Returns the exit code."""
    _raise_descriptors()

    async def main() -> int:
        return await Supervisor(config, environment, **choices).run()

    return asyncio.run(main())
