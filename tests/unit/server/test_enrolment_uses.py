"""An enrolment token is good for as many devices as it says, also where two come at once."""

import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from skerry_server import ca, devices
from skerry_server.db import migrations
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from skerry_server.errors import Unauthenticated
from sqlalchemy import event, func, insert, select

NOW_MS = 1_800_000_000_000


def request_of(device):
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    made = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture
def engine(tmp_path):
    made = open_engine(sqlite_url(tmp_path / "server.db"))
    migrations.migrate(made)
    with writing(made) as conn:
        conn.execute(insert(t.groups).values(name="line-1", created_ms=0))
    yield made
    made.dispose()


def test_the_last_use_that_another_device_took_meanwhile_is_not_there_twice(engine, tmp_path):
    authority = ca.open_ca(tmp_path / "ca", dt.datetime.fromtimestamp(NOW_MS / 1000, dt.UTC))
    with writing(engine) as conn:
        token = devices.create_enrolment_token(
            conn,
            device=None,
            serial_prefix="press-",
            group="line-1",
            tags={},
            uses=1,
            expires_s=3600,
            actor="ada",
            now_ms=NOW_MS,
        )

    def enrol(name):
        with writing(engine) as conn:
            return devices.enrol(conn, authority, token=token, csr_pem=request_of(name), asked_id=name, now_ms=NOW_MS)

    # What PostgreSQL shows to the second of two at once: one use when it reads, none when it writes.
    @event.listens_for(engine, "before_cursor_execute")
    def the_other(conn, cursor, statement, *_):
        if statement.startswith("UPDATE enrolment_tokens"):
            cursor.execute("UPDATE enrolment_tokens SET uses_left = 0")

    with pytest.raises(Unauthenticated):
        enrol("press-2")
    event.remove(engine, "before_cursor_execute", the_other)
    with reading(engine) as conn:
        assert conn.execute(select(func.count()).select_from(t.devices)).scalar_one() == 0
    assert enrol("press-1").device == "press-1"
    with pytest.raises(Unauthenticated):
        enrol("press-3")
