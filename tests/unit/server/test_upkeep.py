"""What devices say they hold: who lies hides nobody, and who is gone is forgotten."""

import pytest
from skerry_server import upkeep
from skerry_server.db import migrations
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from sqlalchemy import insert, select, update

from tests.unit.server.ingest.conftest import device_row

FAR = 1 << 60
NOW_MS = 1_000_000


class Served:
    """What the repository serves: its versions, and the jumps that were asked of it."""

    def __init__(self):
        self.versions = dict.fromkeys(("timestamp", "snapshot", "fleet"), 10)
        self.jumps = []

    clock_behind = False

    def status(self):
        return {role: {"version": version} for role, version in self.versions.items()}

    def jump(self, above, devices, *, actor):
        self.jumps.append((dict(above), dict(devices)))


@pytest.fixture
def engine(tmp_path):
    made = open_engine(sqlite_url(tmp_path / "server.db"))
    migrations.migrate(made)
    with writing(made) as conn:
        conn.execute(insert(t.groups).values(name="g", created_ms=0))
        for name in ("liar", "press-1", "press-2"):
            conn.execute(insert(t.devices).values(**device_row(name)))
        for role in ("timestamp", "snapshot", "fleet"):
            conn.execute(insert(t.roles).values(role=role, version=10, expires_ms=1 << 50, bytes=b""))
    yield made
    made.dispose()


def say(engine, **held):
    with writing(engine) as conn:
        upkeep.note_held(conn, {name.replace("_", "-"): said for name, said in held.items()}, NOW_MS)


def remembered(engine):
    with reading(engine) as conn:
        return {row.role: (row.version, row.device) for row in conn.execute(select(t.ahead))}


@pytest.mark.parametrize("order", ["before", "after", "together"])
def test_a_device_that_lies_does_not_hide_what_the_others_hold(engine, order):
    lie, truth = {"liar": {"timestamp": FAR, "fleet": FAR}}, {"press_1": {"timestamp": 25, "fleet": 15}}
    for held in {"before": (lie, truth), "after": (truth, lie), "together": ({**lie, **truth},)}[order]:
        say(engine, **held)
    assert remembered(engine) == {"timestamp": (25, "press-1"), "fleet": (15, "press-1")}
    served = Served()
    upkeep.Upkeep(engine, served).look(NOW_MS)
    assert served.jumps == [({"timestamp": 25, "fleet": 15}, {"timestamp": "press-1", "fleet": "press-1"})]


def test_a_lie_is_shown_while_nobody_says_what_can_be(engine):
    say(engine, liar={"timestamp": FAR})
    served = Served()
    upkeep.Upkeep(engine, served).look(NOW_MS)
    assert (served.jumps, remembered(engine)) == ([], {"timestamp": (FAR, "liar")})


def test_of_what_can_be_the_highest_counts(engine):
    say(engine, press_1={"timestamp": 25})
    say(engine, press_2={"timestamp": 24})
    assert remembered(engine) == {"timestamp": (25, "press-1")}
    say(engine, press_2={"timestamp": 26})
    assert remembered(engine) == {"timestamp": (26, "press-2")}


def test_what_a_revoked_device_said_is_forgotten_and_its_alert_closes(engine):
    say(engine, liar={"timestamp": FAR})
    looks = upkeep.Upkeep(engine, Served())
    looks.look(NOW_MS)
    with reading(engine) as conn:
        assert [alert.role for alert in upkeep.alerts(conn, NOW_MS) if alert.code == "devices_hold_newer"] == [
            "timestamp"
        ]
    with writing(engine) as conn:
        conn.execute(update(t.devices).where(t.devices.c.id == "liar").values(status="revoked"))
    looks.look(NOW_MS)
    with reading(engine) as conn:
        assert [alert for alert in upkeep.alerts(conn, NOW_MS) if alert.code == "devices_hold_newer"] == []
        actions = [
            row.action for row in conn.execute(select(t.audit.c.action).where(t.audit.c.subject.like("%hold_newer")))
        ]
    assert actions == ["alert.open", "alert.close"]
