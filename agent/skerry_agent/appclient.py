"""One application that is connected: what it may have, what it is told, and what is taken from it.

An application is believed about its own requests and about nothing else. What it says that cannot be ends its connection, or puts the
ring aside that it is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skerry_contract import manifest as m
from skerry_contract import window as w
from skerry_contract import wire
from skerry_contract.errors import ContractError

from skerry_agent import __version__, appwire
from skerry_agent import workerwire as ww
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.control import Answer
from skerry_agent.core import holds
from skerry_agent.errors import AgentError, Degraded
from skerry_agent.holding import Holding
from skerry_agent.lending import Grant, Lending, is_file, is_ours
from skerry_agent.logs import kv
from skerry_agent.serving.rings import Rings, book_of
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store

log = logging.getLogger(__name__)

_HELLO_S = 10.0
_AGAIN_S = 600.0
"""A bundle that did not run in an application is offered again after so long: what was missing may have been installed."""
_ASIDE_S = 60.0
"""A user's application that sends windows that cannot be more often than so is hung up on."""
_MOST_QUEUED = 1024
_MOST_MODELS = 64


class House(Lending):
    """What a connected application needs of the socket's side, and all applications together.

    Args:
        window_s: how long a window spans now.
        on_event: takes (name, code, data) for the server.
        device: its id, for spans.
        holding: takes locks of updates.

    Attributes:
        clients: who is connected; loop: set once applications are accepted.
        aside_s: user -> when a window that cannot be was put aside last; refused_s: when a refusal was told last.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        config: Config,
        store: Store,
        slots: Slots,
        clock: Clock,
        rings: Rings,
        *,
        window_s: Callable[[], float],
        on_event: Callable[[str, str, dict[str, Any]], None],
        holding: Holding,
        device: str = "",
    ) -> None:
        super().__init__(config, store, slots, rings)
        self.holding = holding
        self.clock = clock
        self.window_s = window_s
        self.on_event = on_event
        self.device = device
        self.clients: set[Client] = set()
        self.aside_s: dict[int, float] = {}
        self.refused_s: dict[tuple[int, str], float] = {}


class Client:
    """One connected application.

    Attributes:
        rings: model -> ring it counts in, as far as it was told.
    """

    def __init__(self, house: House, sock: socket.socket, pid: int, uid: int) -> None:
        self.pid, self.uid = pid, uid
        self.rings: dict[str, str] = {}
        self._house = house
        self._sock = sock
        self._held: set[str] = set()
        self._aside: set[str] = set()
        self._cut: dict[str, int] = {}
        self._follows: set[str] = set()
        self._told: dict[str, str] = {}
        self._refused: dict[str, tuple[str, float]] = {}
        self._queue: deque[tuple[ww.Message, tuple[int, ...]]] = deque()
        self._greeted = False
        self._since_s = house.clock.boot_s()
        house.loop.add_reader(sock.fileno(), self._readable)

    def tick(self) -> None:
        """Offers what is confirmed now; ends who never said a word."""
        if not self._greeted and self._house.clock.boot_s() - self._since_s > _HELLO_S:
            self.close()
            return
        for model in sorted(self._follows):
            self._offer(model)

    def close(self) -> None:
        """Hangs up. What it held is folded once its locks are gone."""
        if self not in self._house.clients:
            return
        self._house.clients.discard(self)
        self._house.loop.remove_reader(self._sock.fileno())
        self._house.loop.remove_writer(self._sock.fileno())
        while self._queue:
            for fd in self._queue.popleft()[1]:
                os.close(fd)
        self._sock.close()
        self._house.give_back(*self._held)

    def send(self, message: ww.Message, fd: int | None = None) -> None:
        """Sends a message, or keeps it until the application reads. One that never reads is left."""
        self._send(message, () if fd is None else (os.dup(fd),))

    def _send(self, message: ww.Message, fds: tuple[int, ...]) -> None:
        """``fds`` are closed once they are sent."""
        if self not in self._house.clients or len(self._queue) > _MOST_QUEUED:
            for fd in fds:
                os.close(fd)
            self.close()
            return
        self._queue.append((message, fds))
        self._flush()

    def _flush(self) -> None:
        while self._queue:
            message, fds = self._queue[0]
            try:
                if not appwire.send(self._sock, message, fds):
                    self._house.loop.add_writer(self._sock.fileno(), self._flush)
                    return
            except OSError:
                # What it said before may still be unread; the reader ends it.
                for _, left in self._queue:
                    for fd in left:
                        os.close(fd)
                self._queue.clear()
                break
            self._queue.popleft()
            for fd in fds:
                os.close(fd)
        self._house.loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        # Bounded, so that one application cannot hold up everything else.
        for _ in range(32):
            if self not in self._house.clients:
                return
            try:
                found = appwire.receive_at_supervisor(self._sock)
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue
            except (appwire.Malformed, OSError) as error:
                log.warning("application dropped", extra=kv(pid=self.pid, uid=self.uid, detail=str(error)[:200]))
                found = None
            if found is None:
                self.close()
                return
            message, fds = found
            try:
                self._take(message, fds)
            except (AgentError, ContractError) as error:
                log.warning("application dropped", extra=kv(pid=self.pid, uid=self.uid, detail=str(error)[:200]))
                self.close()
            finally:
                for fd in fds:
                    os.close(fd)

    # --- what it says ------------------------------------------------------------------------------------------------

    def _take(self, message: ww.Message, fds: list[int]) -> None:
        if isinstance(message, appwire.Hello):
            self._greet(message)
            return
        if not self._greeted:
            raise Degraded("malformed", "no hello")
        match message:
            case appwire.Follow(model=model, ring=ring):
                self._follow(model, ring)
            case appwire.Keep():
                self._keep(message, fds)
            case appwire.Fetch(digest=digest, path=path):
                self._fetch(digest, path)
            case ww.WindowCut():
                self._window(message)
            case appwire.Done(ring=ring, upto=upto):
                self._done(ring, upto)
            case ww.BookClosed(book=book) if book in self._held:
                self._let_go(book)
                self._house.rings.book_closed(message)
            case appwire.Refused():
                self._refuse(message)
            case appwire.Lock():
                self._locked(self._house.holding.take(self._owner(message.owner), message.reason, message.for_s))
            case appwire.Unlock():
                self._locked(self._house.holding.give_back(self._owner(message.owner)))
            case _:
                raise Degraded("malformed", f"an unexpected {type(message).__name__}")

    def _owner(self, name: str) -> str:
        # Nobody ends, or stands in for, another user's lock.
        return f"{name[: holds.MOST_CHARS]}{holds.of_user(self.uid)}"

    def _locked(self, answer: Answer) -> None:
        body: dict[str, Any] = answer.body
        self.send(appwire.Locked(ok=answer.status == 200, code=body.get("code", ""), detail=body.get("error", "")))

    def _greet(self, hello: appwire.Hello) -> None:
        if hello.protocol != appwire.PROTOCOL:
            detail = f"the agent ({__version__}) speaks protocol {appwire.PROTOCOL}, the application ({hello.agent[:40]}) {hello.protocol}"
            self.send(appwire.Sorry(code="other_protocol", detail=detail))
            self.close()
            return
        config = self._house.config
        self._greeted = True
        self.send(
            appwire.Welcome(
                agent=__version__, boot_id=self._house.clock.boot_id, window_s=self._house.window_s(),
                fold_interval_s=config.timing.fold_interval_s, label_age_s=config.labels.max_age_s,
                label_predictions=config.labels.predictions, label_books=config.labels.former_keys,
                otlp_endpoint=config.telemetry.otlp_endpoint, trace_share=config.telemetry.trace_share, device=self._house.device,
                locks=True,
            )
        )  # fmt: skip

    def _follow(self, model: str, ring: str) -> None:
        if len(self._follows) >= _MOST_MODELS:
            raise Degraded("malformed", f"more than {_MOST_MODELS} models")
        self._follows.add(model)
        self._told.pop(model, None)
        if ring in self._held:
            self.rings[model] = ring
        self._offer(model)

    def _offer(self, model: str) -> None:
        house = self._house
        slot = house.slots.pointers(model).confirmed
        if slot is None or not house.slots.may_serve(model, slot):
            self._say_nothing(model, slot)
            return
        held = house.grants.get(self.rings.get(model, ""))
        if held is not None and held.key == w.Key(model, slot.digest, slot.variant, slot.arm, slot.rollout, slot.stage):
            return
        digest, at_s = self._refused.get(model, ("", 0.0))
        if digest == slot.digest and house.clock.boot_s() - at_s < _AGAIN_S:
            return
        try:
            ring, book, fds = house.lend(slot, model, self.uid)
        except Degraded as error:
            self._say(appwire.Nothing(model=model, code=error.code, detail=error.detail))
            return
        self._held |= {path for path in (ring, book) if path}
        self.rings[model] = ring
        self._told.pop(model, None)
        served = ww.Served(
            name=model, version=slot.version, digest=slot.digest, variant=slot.variant, path=str(house.slots.load_path(slot.digest)),
            ring=ring, arm=slot.arm, rollout=slot.rollout, stage=slot.stage,
        )  # fmt: skip
        self._send(appwire.Grant(served=served, book=book), fds)

    def _say_nothing(self, model: str, slot: Slot | None) -> None:
        known = self._house.slots.models()
        if slot is not None and self._house.slots.forbidden(model, slot.version):
            code, detail = (
                "below_forced_floor",
                f"{model} {slot.version} must not serve any more: a forced floor is above it",
            )
        elif slot is not None:
            code, detail = "model_damaged", f"{model} {slot.version} is not whole on disk"
        elif model in known:
            code, detail = "not_confirmed", f"{model} is on trial here; no version of it is confirmed yet"
        else:
            code, detail = "unknown_model", f"this device has {', '.join(known) or 'no model'}, and no {model[:80]}"
        self._say(appwire.Nothing(model=model, code=code, detail=detail))

    def _say(self, nothing: appwire.Nothing) -> None:
        if self._told.get(nothing.model) != nothing.code:
            self._told[nothing.model] = nothing.code
            self.send(nothing)

    def _keep(self, message: appwire.Keep, fds: list[int]) -> None:
        house = self._house
        mine = (
            is_ours(message.ring, "ring", house.folder)
            and 0 < len(fds) == len(message.parts)
            and not house.lent & set(message.parts)
            and set(message.parts) <= {message.ring, book_of(message.ring)}
            and all(is_file(fd, path, house.folder) for fd, path in zip(fds, message.parts, strict=True))
        )
        grant = house.grants.get(message.ring)
        key = w.Key(*message.key)
        if mine and grant is None and house.may_count(message.ring, key):
            # The store that knew of it was moved aside. The descriptor proves that an agent gave it away.
            grant = Grant(
                model=key.model, digest=key.bundle, version=message.version, variant=key.variant, arm=key.arm,
                rollout=key.rollout, stage=key.stage, uid=self.uid,
            )  # fmt: skip
            house.keep_grants({**house.grants, message.ring: grant})
        if not mine or grant is None or grant.uid != self.uid:
            log.warning("ring not kept", extra=kv(pid=self.pid, ring=Path(message.ring).name[:100]))
            self.send(appwire.Held(ring=message.ring, ok=False))
            return
        house.lent |= set(message.parts)
        self._held |= set(message.parts)
        held = tuple(house.rings.continued(Path(path)) for path in message.parts)
        self._cut.update(zip(message.parts, held, strict=True))
        self.send(appwire.Held(ring=message.ring, upto=held))

    def _fetch(self, digest: str, path: str) -> None:
        house = self._house
        granted = {house.grants[ring].digest for ring in self.rings.values() if ring in house.grants}
        manifest = house.slots.manifest(digest) if digest in granted else None
        listed = {m.MANIFEST_FILE, *(file.path for file in manifest.files())} if manifest is not None else set()
        fds: tuple[int, ...] = ()
        if path in listed:
            with contextlib.suppress(OSError):
                fds = (os.open(house.slots.load_path(digest) / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC),)
        self._send(appwire.File(digest=digest, path=path), fds)

    def _window(self, cut: ww.WindowCut) -> None:
        house = self._house
        if cut.ring in self._aside:
            return
        if cut.ring not in self._held:
            raise Degraded("malformed", "a window of a ring that it does not hold")
        if cut.start != self._cut.get(cut.ring, 0) or cut.upto <= cut.start:
            raise Degraded("malformed", f"a window of {cut.start} to {cut.upto} after {self._cut.get(cut.ring, 0)}")
        try:
            window = wire.decode(w.Window, cut.body, max_bytes=wire.MAX_INFLATED_BYTES)
            w.check(window)
        except ContractError as error:
            self._put_aside(cut.ring, str(error))
            return
        if not house.may_count(cut.ring, window.key):
            raise Degraded("malformed", "a window of another key")
        if cut.inferences != window.counts.ok:
            self._put_aside(cut.ring, f"{window.counts.ok} answered, {cut.inferences} said")
            return
        self._cut[cut.ring] = cut.upto
        house.rings.commit(self, cut)

    def _put_aside(self, ring: str, detail: str) -> None:
        """A window that cannot be: what was counted stands in the ring, which a worker folds once the application uses another."""
        now_s = self._house.clock.boot_s()
        if now_s - self._house.aside_s.get(self.uid, -math.inf) < _ASIDE_S:
            raise Degraded("malformed", f"another window that cannot be: {detail}")
        self._house.aside_s[self.uid] = now_s
        log.error(
            "window cannot be, its ring is folded here",
            extra=kv(pid=self.pid, ring=Path(ring).name, detail=detail[:200]),
        )
        self._aside.add(ring)
        for model in [model for model, mine in self.rings.items() if mine == ring]:
            # The other ring first: the application leaves this one while it still holds it.
            del self.rings[model]
            self._told.pop(model, None)
            self._offer(model)
        self.send(appwire.Held(ring=ring, ok=False))
        for path in (ring, book_of(ring)):
            if path in self._held:
                self._let_go(path)

    def _done(self, ring: str, upto: int) -> None:
        if ring in self._held:
            self._let_go(ring)
            if self._house.rings.spent(ring) or upto == 0:
                self._house.rings.remove(ring)

    def _let_go(self, path: str) -> None:
        self._held.discard(path)
        self._house.give_back(path)
        self.rings = {model: ring for model, ring in self.rings.items() if ring != path}

    def _refuse(self, message: appwire.Refused) -> None:
        house, now_s = self._house, self._house.clock.boot_s()
        grant = house.grants.get(message.ring)
        if (
            message.ring not in self._held
            or grant is None
            or (grant.model, grant.digest) != (message.model, message.digest)
        ):
            return
        self._refused[message.model] = (message.digest, now_s)
        told = (self.uid, message.digest)
        if now_s - house.refused_s.get(told, -math.inf) < _AGAIN_S:
            return
        house.refused_s[told] = now_s
        log.error(
            "bundle does not run in an application",
            extra=kv(pid=self.pid, model=message.model[:80], digest=message.digest[:64], code=message.code[:80], detail=message.detail[:500]),
        )  # fmt: skip
        data = {
            "model": message.model[:80],
            "digest": message.digest[:64],
            "detail": message.detail[:500],
            "where": "application",
        }
        house.on_event("application", message.code[:64], data)
