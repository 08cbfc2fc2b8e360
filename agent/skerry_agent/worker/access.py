"""Who may ask and label, how often, and how often all of them together: judged before anything else of a request is looked at: at its
header block, when its body is still to come.

There is a gate only where something is configured or an operator throttles; without one a request pays nothing. A client is known by
its bearer token or by the credentials of its process on a unix socket (``SO_PEERCRED``, which stay those of who connected when the
connection is handed over). Health may be asked by everyone. Each limit is a token bucket, whose own arithmetic says when the
next request would pass; of two limits that refuse, the longer wait is told. Buckets hold for all
workers of the device together (``buckets``).
"""

from __future__ import annotations

import hmac
import logging
import math
import os
import time
from pathlib import Path
from typing import NamedTuple, Protocol

from skerry_contract import window as w

from skerry_agent import clients as c
from skerry_agent import workerwire as ww
from skerry_agent.errors import Degraded
from skerry_agent.worker import http1
from skerry_agent.worker.buckets import Bucket, Buckets

log = logging.getLogger(__name__)

OPEN, ASK, INFER, LABEL = range(4)
"""What a request wants: health, something about models, an inference, to label."""
_LOOK_S = 0.5
_THROTTLE = "\0throttle"
"""No client's name."""
DENIED, RATE, THROTTLED = (1 << w.GUARD_KINDS.index(f"access.{kind}") for kind in ("denied", "rate", "throttled"))


class Asker(Protocol):
    """The connection that a request came on.

    Attributes:
        known: where the gate keeps whom it found behind a header block.
        refused_s: when it was last refused, or will be; the loop's time.
    """

    known: tuple[http1.Head, int, c.Client] | None
    refused_s: float

    def peer(self) -> tuple[int, int] | None:
        """User and group id of the process at the other end of a unix socket; None on any other."""


class Refusal(NamedTuple):
    """Why a request is not served. ``kinds``: bits of ``window.GUARD_KINDS``; ``extra``: header lines."""

    status: int
    message: str
    kinds: int
    extra: bytes = b""


class Gate:
    """The gate of one worker. Not thread-safe: every call comes from the event loop's thread."""

    def __init__(self, access: ww.Access, throttle: float) -> None:
        self._access = access
        self._path = Path(access.clients) if access.clients else None
        self._clients: tuple[tuple[c.Client, bytes], ...] = ()
        self._seen: tuple[int, int, int] | None = (-1, -1, -1)
        self._looked_s = -math.inf
        self._epoch = 0
        self._all = Buckets(access.shared)
        self._buckets: dict[str, Bucket] = {}
        self._throttle: Bucket | None = None
        self.throttle(throttle)

    @property
    def idle(self) -> bool:
        """Whether it stops nothing."""
        return self._path is None and self._throttle is None and not self._access.rate

    def throttle(self, rate: float) -> None:
        """Lets so many inferences per second through, of all clients together; 0 for no bound."""
        self._throttle = self._all.bucket(_THROTTLE, rate, max(1.0, rate)) if rate else None

    def judge(self, head: http1.Head, asker: Asker, what: int, model: str, *, take: bool = True) -> Refusal | None:
        """Why the request must not be served, or None.

        Args:
            model: that it is about; empty for none, or not one alone.
            take: whether it counts; not for one that is not whole yet, and will be judged again.
        """
        if what == OPEN:
            return None
        client: c.Client | None = None
        if self._path is not None:
            client = self._find(head, asker)
            if client is None:
                why = "this token is not known" if head.authorization else "wanted Authorization: Bearer TOKEN"
                return Refusal(401, why, DENIED, b"WWW-Authenticate: Bearer\r\n")
            if model and client.models and model not in client.models:
                return Refusal(403, f"{client.name} may not ask {model}", DENIED)
            if what == LABEL and not client.label:
                return Refusal(403, f"{client.name} may not label", DENIED)
        return self._within(client, asker, what, take)

    def lets_by(self, head: http1.Head, asker: Asker, model: str) -> bool:
        """Whether ``judge`` would let the client ask the model at all; how often is not looked at, nor counted."""
        if self._path is None:
            return True
        client = self._find(head, asker)
        return client is not None and (not model or not client.models or model in client.models)

    def name_of(self, head: http1.Head, asker: Asker) -> str:
        """The name of a known client; empty where clients have none."""
        client = self._find(head, asker) if self._path is not None else None
        return client.name if client is not None else ""

    def models_of(self, head: http1.Head, asker: Asker) -> tuple[str, ...]:
        """The models that who passed ``judge`` may ask; empty for all."""
        client = self._find(head, asker) if self._path is not None else None
        return client.models if client is not None else ()

    # --- how often ---------------------------------------------------------------------------------------------------

    def _within(self, client: c.Client | None, asker: Asker, what: int, take: bool) -> Refusal | None:
        name, own = self._own_bucket(client, asker)
        shared = self._throttle if what == INFER else None
        if own is None and shared is None:
            return None
        with self._all.held():
            now_s = time.monotonic()
            own_s = own.wait_s(now_s) if own is not None else 0.0
            shared_s = shared.wait_s(now_s) if shared is not None else 0.0
            if not own_s and not shared_s:
                if own is not None and take:
                    own.take()
                if shared is not None and take:
                    shared.take()
                return None
        if own is not None and own_s > 0 and own_s >= shared_s:
            return _later(f"{name}: more than {own.rate:g} requests/s", RATE, own_s)
        assert shared is not None
        return _later(f"the operator allows {shared.rate:g} inferences/s", THROTTLED, shared_s)

    def _own_bucket(self, client: c.Client | None, asker: Asker) -> tuple[str, Bucket | None]:
        rate, burst = self._access.rate, self._access.burst
        if client is not None:
            name = client.name
            rate = rate if client.rate is None else client.rate
            burst = burst if client.burst is None else client.burst
        elif not rate:
            return "", None
        else:
            name = peer_name(asker)
        bucket = self._buckets.get(name)
        if bucket is None and rate:
            bucket = self._buckets[name] = self._all.bucket(name, rate, burst or max(1.0, rate))
        return name, bucket

    # --- who ---------------------------------------------------------------------------------------------------------

    def _find(self, head: http1.Head, asker: Asker) -> c.Client | None:
        self._look()
        known = asker.known
        if known is not None and known[0] is head and known[1] == self._epoch:
            return known[2]
        client = self._by_token(head.authorization) if head.authorization else self._by_peer(asker.peer())
        if client is not None:
            asker.known = (head, self._epoch, client)
        return client

    def _by_token(self, authorization: bytes) -> c.Client | None:
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        digest = c.hashed(token.strip())
        found = None
        for client, known in self._clients:
            # All of them, always: how long it takes says nothing about whose it was.
            if hmac.compare_digest(digest, known):
                found = client
        return found

    def _by_peer(self, peer: tuple[int, int] | None) -> c.Client | None:
        if peer is None:
            return None
        by_uid = next((client for client, _ in self._clients if client.uid == peer[0]), None)
        return by_uid or next((client for client, _ in self._clients if client.gid == peer[1]), None)

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_S or self._path is None:
            return
        self._looked_s = now_s
        try:
            found = os.stat(self._path)
            seen = found.st_mtime_ns, found.st_size, found.st_ino
        except OSError:
            seen = None
        if seen == self._seen:
            return
        self._seen = seen
        try:
            read = c.read(self._path)
        except Degraded as error:
            # Who was known stays known, and nobody else: what the file says cannot be told.
            log.error("clients not read code=%s detail=%s", error.code, error.detail)
            if self._epoch:
                return
            try:
                read = c.last_good(self._path)
            except Degraded:
                return
        else:
            c.keep(self._path, read)
        self._clients = tuple((client, bytes.fromhex(client.token_sha256)) for client in read)
        self._epoch += 1
        self._buckets.clear()


def peer_name(asker: Asker) -> str:
    """Who asks, where no client is known by name: the user of a process on the unix socket, or whoever is on the port."""
    peer = asker.peer()
    return "loopback" if peer is None else f"uid {peer[0]}"


def _later(message: str, kinds: int, wait_s: float) -> Refusal:
    return Refusal(429, message, kinds, http1.retry_after(wait_s))
