"""The clients of the local endpoint: a file of who may ask what, kept by ``skerry-agent token``, read by the workers.

A client is known by its token, of which the file has only the sha256, or by the user or group of the process at the other end
of the unix socket. The file is replaced in one rename; a worker sees that within a second. Loads only msgspec and the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from skerry_agent.errors import Degraded, Rejected

FILE = "clients.json"
LAST = "clients.last.json"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
_MOST_BYTES = 1 << 20


class Client(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One client. Exactly one of ``token_sha256``, ``uid`` and ``gid`` is set.

    Attributes:
        models: that it may ask; empty for all.
        label: whether it may send labels.
        rate: requests per second; None for ``access.rate``, 0 for no limit.
        burst: how many at once after a pause; None for ``access.burst``.
    """

    name: str
    token_sha256: str = ""
    uid: int | None = None
    gid: int | None = None
    models: tuple[str, ...] = ()
    label: bool = True
    rate: float | None = None
    burst: int | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    clients: tuple[Client, ...] = ()


def hashed(token: bytes) -> bytes:
    """What the file has of a token, before it is written as hexadecimal digits. A token is 256 random bits: no salt is needed."""
    return hashlib.sha256(token).digest()


def read(path: Path) -> tuple[Client, ...]:
    """The clients of a file; none when it is not there.

    Raises:
        Degraded: ``clients_damaged``.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise Degraded("clients_damaged", f"{path}: {error.strerror}") from None
    try:
        if len(data) > _MOST_BYTES:
            raise ValueError(f"at most {_MOST_BYTES} bytes wanted")
        found = msgspec.json.decode(data, type=_File).clients
        for client in found:
            _check(client)
    except (msgspec.DecodeError, ValueError) as error:
        raise Degraded(
            "clients_damaged", f"{path}: {error}", advice="remove the file, and add the clients again"
        ) from None
    return found


def add(path: Path, client: Client, *, token: bool) -> str:
    """Adds a client.

    Args:
        client: without its token.
        token: whether it is to have one.

    Returns:
        The token, which stands nowhere; empty without one.

    Raises:
        Rejected: ``client_exists``, or ``client_invalid`` with what is wrong.
        Degraded: the file is damaged, or cannot be written.
    """
    with _alone(path):
        return _add(path, client, token=token)


def _add(path: Path, client: Client, *, token: bool) -> str:
    # Workers import this module and never come here.
    import secrets

    known = read(path)
    if any(client.name == other.name for other in known):
        raise Rejected(
            "client_exists",
            f"name: wanted a new one, got {client.name!r}, which is there",
            advice=f"skerry-agent token remove {client.name}, then add it again",
        )
    made = secrets.token_urlsafe(32) if token else ""
    if made:
        client = msgspec.structs.replace(client, token_sha256=hashed(made.encode()).hex())
    try:
        _check(client)
    except ValueError as error:
        raise Rejected("client_invalid", str(error)) from None
    _write(path, (*known, client))
    return made


def remove(path: Path, name: str) -> None:
    """Removes a client.

    Raises:
        Rejected: ``client_unknown``.
        Degraded: the file is damaged, or cannot be written.
    """
    with _alone(path):
        known = read(path)
        kept = tuple(client for client in known if client.name != name)
        if len(kept) == len(known):
            raise Rejected(
                "client_unknown",
                f"name: wanted a client that is there, got {name!r}",
                advice=f"known are: {', '.join(c.name for c in known) or 'none'}",
            )
        _write(path, kept)


def _check(client: Client) -> None:
    if _NAME.fullmatch(client.name) is None:
        raise ValueError(f"name: wanted a-z, 0-9 and dashes inside, at most 64, got {client.name[:80]!r}")
    if sum((bool(client.token_sha256), client.uid is not None, client.gid is not None)) != 1:
        raise ValueError(f"{client.name}: wanted a token, a uid or a gid, one of them")
    if client.token_sha256 and re.fullmatch("[0-9a-f]{64}", client.token_sha256) is None:
        raise ValueError(f"{client.name}: token_sha256: wanted 64 hexadecimal digits")
    for number in (client.uid, client.gid):
        if number is not None and not 0 <= number < 1 << 32:
            raise ValueError(f"{client.name}: wanted a uid or gid from 0 to 2**32, got {number}")
    if client.rate is not None and not 0 <= client.rate <= 1e6:
        raise ValueError(f"{client.name}: rate: wanted 0 to 1e6 requests/s, got {client.rate}")
    if client.burst is not None and not 1 <= client.burst <= 1_000_000:
        raise ValueError(f"{client.name}: burst: wanted 1 to 1000000, got {client.burst}")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One change at a time: of two that read and write in turn, one would be lost, whose token was given away."""
    try:
        # The folder itself is locked: it is there, and nothing is left behind.
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise Degraded("clients_not_written", f"{path}: {error.strerror}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def last_good(path: Path) -> tuple[Client, ...]:
    """The clients as somebody last read or wrote them, for when the file is damaged; none when nobody did.

    Raises:
        Degraded: ``clients_damaged``: this copy is, too.
    """
    return read(path.with_name(LAST))


def keep(path: Path, clients: tuple[Client, ...]) -> None:
    """Keeps what was read, for ``last_good``. Where that cannot be, the file serves as long as it is whole."""
    copy = path.with_name(LAST)
    with contextlib.suppress(OSError, Degraded):
        if not clients and not copy.exists():
            return
        with contextlib.suppress(Degraded):
            if read(copy) == clients:
                return
        _put(copy, clients)


def _write(path: Path, clients: tuple[Client, ...]) -> None:
    try:
        _put(path, clients)
    except OSError as error:
        raise Degraded("clients_not_written", f"{path}: {error.strerror}") from None
    # Who was removed must not come back.
    keep(path, clients)


def _put(path: Path, clients: tuple[Client, ...]) -> None:
    # A name of its own: workers keep copies, each when it likes.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(_File(clients)), indent=1))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
