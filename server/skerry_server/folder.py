"""The folder that one server lives in: making it, and holding it alone.

Leaves running to ``app``: ``skerry-server init`` needs neither the HTTP application nor anything that counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from skerry_server import access, ca, clock, durable, online_keys
from skerry_server.config import Settings
from skerry_server.db.engine import open_engine, reading, writing
from skerry_server.db.migrations import migrate

log = logging.getLogger(__name__)

ADMIN_TOKEN = "admin.token"  # noqa: S105 - a file name


class NotInitialised(Exception):
    """The folder holds no server."""


class AlreadyRunning(Exception):
    """Another server runs in this folder."""


def initialise(settings: Settings, online_uri: str | None = None) -> dict[str, Any]:
    """Makes what a new server needs: folder, CA, online key, database, admin token. Again is fine: what is there stays,
    except a file of an admin token that the database does not know.

    Args:
        online_uri: where a new server's online key lies, instead of a file that is made here.

    Returns:
        Where the parts are, and the CA's fingerprint; no secrets.
    """
    data = settings.data
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with only_server(data):
        now = clock.utc_now()
        authority = ca.open_ca(data / "ca", now)
        authority.ensure_own([settings.server.public_host, *settings.server.public_names], now)
        if online_uri is not None:
            online_keys.begin_with(data / "keys", online_uri)
        online_keys.open_all(data / "keys")
        engine = open_engine(settings.database_url)
        try:
            migrate(engine)
            _ensure_admin(engine, data / ADMIN_TOKEN)
        finally:
            engine.dispose()
    return {
        "data": str(data),
        "ca": str(authority.files.ca),
        "ca_sha256": authority.sha256,
        "online_keys": str(data / "keys" / "online.pub.json"),
        "admin_token": str(data / ADMIN_TOKEN),
    }


def issue_broker_certificate(settings: Settings, folder: Path, names: list[str]) -> dict[str, Any]:
    """Writes certificate and key of an external broker, signed by the fleet's CA, into ``folder``. A running server is no hindrance.

    Raises:
        NotInitialised: ``initialise`` was never run here.
    """
    require_initialised(settings.data)
    authority = ca.open_ca(settings.data / "ca", clock.utc_now())
    authority.issue_listener(folder, names, clock.utc_now())
    files = {"ca": "ca.pem", "certificate": "broker.pem", "key": "broker.key"}
    return {what: str(folder / name) for what, name in files.items()}


def new_online_key(settings: Settings, uri: str | None = None) -> dict[str, Any]:
    """Makes one more online key, or names one behind a URI. A running server is no hindrance; it knows the key from its next start on.

    Raises:
        NotInitialised: ``initialise`` was never run here.
    """
    require_initialised(settings.data)
    made = online_keys.add(settings.data / "keys", uri)
    return {"keyid": made.public_key.keyid, "online_keys": str(settings.data / "keys" / "online.pub.json")}


def require_initialised(data: Path) -> None:
    """Refuses a folder that ``initialise`` has not made.

    Raises:
        NotInitialised: it holds no server.
    """
    if not (data / "ca" / "ca.pem").exists():
        raise NotInitialised(f"{data} holds no server; run: skerry-server init --data {data}")


def _ensure_admin(engine: Engine, path: Path) -> None:
    if path.exists():
        secret = path.read_text(errors="replace").strip()
        with reading(engine) as conn:
            if access.knows(conn, secret):
                return
        # A power cut between the file and the commit: nobody holds this token's row, and nobody could come in.
        log.warning("no token of this server is in the file, another one is made path=%s", path)
    name = "admin"
    with writing(engine) as conn:
        taken = {row["name"] for row in access.list_tokens(conn)}
        number = 1
        while name in taken:
            # A crash between the row and the file, or a lost file: the old token stays valid until it is revoked.
            number += 1
            name = f"admin-{number}"
        secret = access.create_token(conn, name=name, role="admin", now_ms=clock.now_ms(), actor="system:init")
        durable.write(path, secret.encode() + b"\n", mode=0o600)


@contextlib.contextmanager
def only_server(data: Path) -> Iterator[None]:
    """Holds the folder's lock. The kernel frees it when this process ends, however it ends.

    Raises:
        AlreadyRunning: another process holds it.
    """
    descriptor = os.open(data / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"another server runs in {data}") from None
        yield
    finally:
        os.close(descriptor)
