"""What the supervisor asks a courier: one JSON object per verb, checked before anything is done.

Unknown fields are ignored, so that a newer supervisor can talk to an older courier during an upgrade.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from skerry_agent.errors import Rejected


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What keeps a slow or hostile peer from holding a courier for ever.

    Attributes:
        gap_s: longest silence on a connection; also bounds connecting.
        errand_s: longest run of every verb but ``fetch``.
        slow_s, slow_bytes: while fetching, each ``slow_s`` must bring ``slow_bytes`` at least.
        idle_attempts: connections in a row that bring nothing before ``fetch`` gives up.
        attempts: connections for one file, whatever they bring.
        pause_s: first pause between connections; it doubles up to 30 s, with jitter.
    """

    gap_s: float = 30.0
    errand_s: float = 100.0
    slow_s: float = 60.0
    slow_bytes: int = 16 * 1024
    idle_attempts: int = 5
    attempts: int = 50
    pause_s: float = 0.5


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What every verb gets.

    Attributes:
        state_dir: the agent's state.
        server_url: ``https://host:port`` of the device API; repository_url: the repository's root.
        now_s: wall clock; lower_bound_s: lower bound of now from verified timestamps. Seconds since 1970.
        lower_bound_keys: key ids that signed that bound; when root names none of them any more, the bound is void, so
            that a stolen online key cannot set devices' clocks ahead for ever.
        folder: a signed folder to take from, empty for none: ``sync`` then asks nobody else, ``manifest`` and ``fetch`` ask it first.
        age_s: so long after their date the timestamp, snapshot and fleet role of the folder still count, seconds.
        encryption_key: where the key lies that content keys are wrapped for: ``file``, or a PKCS#11 URI.
    """

    state_dir: str
    server_url: str = ""
    repository_url: str = ""
    now_s: float
    lower_bound_s: float = 0.0
    lower_bound_keys: tuple[str, ...] = ()
    folder: str = ""
    age_s: float = 0.0
    encryption_key: str = "file"
    limits: Limits = Limits()

    @property
    def identity(self) -> Path:
        """The folder of key, certificates and root."""
        return Path(self.state_dir) / "identity"

    @property
    def tuf(self) -> Path:
        """The folder of verified TUF metadata."""
        return Path(self.state_dir) / "tuf"


class Enrol(Common, frozen=True, kw_only=True):
    """``csr_subject``: the id that a device with a prefix token asks for."""

    token: str
    csr_subject: str = ""


class Sync(Common, frozen=True, kw_only=True):
    """``group``: the group that counts while the server cannot be asked for the membership."""

    group: str


class Manifest(Common, frozen=True, kw_only=True):
    """The bundle whose manifest is wanted."""

    model: str
    version: str
    digest: str


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a bundle; ``size`` in bytes."""

    path: str
    sha256: str
    size: int


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A variant of a bundle that lies in a slot."""

    digest: str
    variant: str


class Fetch(Common, frozen=True, kw_only=True):
    """The files of a bundle.

    Attributes:
        files: those of the chosen variant.
        variant: its name; held: what this device has of the model, the likeliest base of a delta first. Both may be left out.
        max_kib_s: rate limit in KiB/s, 0 for none.
        metered: the link is paid by volume: less may come in vain.
        reserve_bytes, reserve_files: what must stay free on the disk for others.
        opened: where encrypted bundles lie in the clear; empty: nowhere, and no delta is taken between them.
    """

    digest: str
    manifest: str
    files: tuple[File, ...]
    variant: str = ""
    held: tuple[Held, ...] = ()
    max_kib_s: int = 0
    metered: bool = False
    reserve_bytes: int = 0
    reserve_files: int = 0
    opened: str = ""


class Unseal(Common, frozen=True, kw_only=True):
    """A variant of an encrypted bundle in a slot. ``folder``: on a tmpfs; its files are opened into a folder of the digest there."""

    digest: str
    variant: str
    folder: str


class Logs(Common, frozen=True, kw_only=True):
    """``number``: of the server's request; ``lines``: what is sent, oldest first."""

    number: int
    lines: str


class Renew(Common, frozen=True, kw_only=True):
    """Nothing but the common fields."""


_R = TypeVar("_R", bound=Common)


def parse(kind: type[_R], data: bytes) -> _R:
    """Reads a request. Raises ``Rejected`` (``bad_request``) that names the field."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise Rejected("bad_request", f"{kind.__name__.lower()}: {error}") from None
