"""One file, whole and verified, wherever it comes from.

A file of a bundle may lie here already, in another bundle of this device, on a stick, be made of an older file and a delta, or
come over the network. Each is a ``Source``; they are asked in turn, the cheapest first, and the last one has everything or
says why not. None is trusted: what counts is that the file at ``path`` has the size and every hash that is wanted.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from skerry_agent import durable
from skerry_agent.courier.meter import Meter
from skerry_agent.errors import Rejected, Transient

_HEX = re.compile(r"[0-9a-f]{32,128}")
_PIECE_BYTES = 1 << 18


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A file by its content.

    Attributes:
        name: for messages and progress; a bundle's file is named by its path there.
        size: bytes.
        hashes: algorithm -> lower-case hex, of the signed description; at least one, and all must hold.
    """

    name: str
    size: int
    hashes: dict[str, str]

    @property
    def key(self) -> str:
        """A file name that stands for the content: the sha256 where there is one. Raises ``Rejected`` (``hash_mismatch``)."""
        for algorithm, value in sorted(self.hashes.items()):
            if algorithm not in hashlib.algorithms_guaranteed or algorithm.startswith("shake"):
                raise Rejected("hash_mismatch", f"{self.name}: nothing here computes a {algorithm!r:.40}")
            if _HEX.fullmatch(value) is None:
                raise Rejected("hash_mismatch", f"{self.name}: {value!r:.80} is no {algorithm}")
        if not self.hashes:
            raise Rejected("hash_mismatch", f"{self.name}: no hash is known")
        return self.hashes.get("sha256") or min(self.hashes.items())[1]


class Source(Protocol):
    """Somewhere a file may come from."""

    def bring(self, wanted: Wanted, path: Path) -> bool:
        """Puts the file at ``path``, whole, verified and synced; its folder exists.

        Returns:
            False when this source does not have it: the next one is asked. Nothing is at ``path`` then that was not before.

        Raises:
            AgentError: it will not come, whoever is asked.
        """


def bring(wanted: Wanted, path: Path, sources: Sequence[Source]) -> Source:
    """Until the file is at ``path``. Returns the source that had it. Raises as the sources; ``Transient`` when none has it."""
    wanted.key  # noqa: B018 (a description that cannot be judged by is refused before anything is asked)
    durable.make_folder(path.parent)
    for source in (*sources, *sources):
        # Twice: what another courier was fetching when the last one was asked may be here now.
        if source.bring(wanted, path):
            return source
    raise Transient("unreachable", f"{wanted.name}: no source has it")


def mismatch(stream: BinaryIO, wanted: Wanted) -> str:
    """What is wrong with a file's content, read from where the stream is; empty when nothing is."""
    hashers = {algorithm: hashlib.new(algorithm) for algorithm in wanted.hashes}
    while piece := stream.read(_PIECE_BYTES):
        for hasher in hashers.values():
            hasher.update(piece)
    for algorithm, hasher in hashers.items():
        if hasher.hexdigest() != wanted.hashes[algorithm]:
            return f"wanted {algorithm} {wanted.hashes[algorithm]}, got {hasher.hexdigest()}"
    return ""


def is_whole(path: Path, wanted: Wanted) -> bool:
    """Whether a file has the size and the hashes. False for anything but a plain file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    with os.fdopen(descriptor, "rb") as stream:
        return os.fstat(descriptor).st_size == wanted.size and not mismatch(stream, wanted)


class Here:
    """What an earlier run brought to the very place."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def bring(self, wanted: Wanted, path: Path) -> bool:
        """As ``Source``."""
        with self._meter.own_work():
            return is_whole(path, wanted)
