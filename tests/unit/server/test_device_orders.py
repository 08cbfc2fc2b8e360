"""Numbers of orders: whatever the server's clock does, the newest order is heard, and as the newest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from skerry_server import device_orders
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, sqlite_url, writing
from skerry_server.db.migrations import migrate
from sqlalchemy import Connection, insert

NOW_MS, DAY_MS = 1_800_000_000_000, 86_400_000
BY = {"reason": "mended", "actor": "token:x"}


@pytest.fixture
def conn(tmp_path: Path) -> Iterator[Connection]:
    engine = open_engine(sqlite_url(tmp_path / "server.db"))
    migrate(engine)
    with writing(engine) as connection:
        connection.execute(insert(t.groups).values(name="line", created_ms=0))
        device = {"id": "d-1", "group": "line", "status": "enrolled", "enrolled_ms": 0, "public_key_sha256": "", "public_key_pem": "", "certificate_serial": "1", "certificate_expires_ms": 0}  # fmt: skip
        connection.execute(insert(t.devices).values(**device))
        yield connection
    engine.dispose()


def test_an_order_after_one_by_a_clock_that_ran_ahead_is_heard_and_is_the_last(conn: Connection) -> None:
    ahead = device_orders.give_group(conn, group="line", now_ms=NOW_MS + DAY_MS, **BY)["number"]
    own = device_orders.give(conn, device="d-1", kind="retry", now_ms=NOW_MS, **BY)["number"]
    cancel = device_orders.give(conn, device="d-1", kind="cancel", now_ms=NOW_MS + 1, **BY)["number"]
    assert ahead < own < cancel
    assert device_orders.standing(conn, "d-1", "line", NOW_MS + 2) == {"retry": own, "cancel": cancel}
    # The group's next one is newer than the device's, whatever their numbers.
    device_orders.give(conn, device="d-1", kind="retry", now_ms=NOW_MS + 3 * DAY_MS, **BY)
    later = device_orders.give_group(conn, group="line", now_ms=NOW_MS + 3, **BY)["number"]
    assert device_orders.standing(conn, "d-1", "line", NOW_MS + 4)["retry"] == later


def test_what_a_device_says_of_one_order_is_not_shown_as_its_word_to_another(conn: Connection) -> None:
    number = device_orders.give_group(conn, group="line", now_ms=NOW_MS, **BY)["number"]
    said = {"device": "d-1", "received_ms": NOW_MS + 5, "at_ms": NOW_MS + 5, "name": "order", "code": ""}
    conn.execute(insert(t.events).values(**said, data={"kind": "cancel", "number": number}))
    (order,) = device_orders.listed(conn, "d-1", "line")
    assert (order["kind"], order["obeyed_ms"]) == ("retry", None)
    conn.execute(insert(t.events).values(**said, data={"kind": "retry", "number": number}))
    (order,) = device_orders.listed(conn, "d-1", "line")
    assert order["obeyed_ms"] == NOW_MS + 5
