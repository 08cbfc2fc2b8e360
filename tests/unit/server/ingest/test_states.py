"""Which of two states is newer, and what liveness goes by."""

import pytest
from skerry_contract import wire
from skerry_server.db import tables as t
from skerry_server.db.engine import writing
from sqlalchemy import update


def row(server):
    return server.rows(t.devices, id="dev-a")[0]


def test_a_birth_fills_the_device(server, make):
    running = {"gas": wire.Running(digest=make.BUNDLE, version="1.0.0", variant="cpu", state="confirmed")}
    server.take(make.state("dev-a", 1, agent="0.1.0", stratum="arm", generation=3, running=running, tuf={"root": 1}))
    found = row(server)
    assert found["online"]
    assert (found["birth"], found["agent"], found["stratum"], found["generation"]) == (1, "0.1.0", "arm", 3)
    assert found["running"]["gas"]["digest"] == make.BUNDLE
    assert found["state"]["tuf"] == {"root": 1}
    assert found["seen_ms"] == server.now_ms


def test_an_old_will_never_overrides_a_newer_birth(server, make):
    server.take(make.state("dev-a", 1))
    server.take(make.state("dev-a", 2))
    server.take(make.state("dev-a", 1, "offline"))
    assert row(server)["online"]
    assert server.counters() == {("dev-a", "stale_state"): 1}


def test_the_will_of_the_present_session_ends_it(server, make):
    server.take(make.state("dev-a", 2, agent="0.1.0"))
    server.take(make.state("dev-a", 2, "offline"))
    assert (row(server)["online"], row(server)["agent"]) == (False, "0.1.0")


@pytest.mark.parametrize("together", [True, False])
def test_the_moment_a_device_went_offline_is_kept_and_no_replay_moves_it(server, make, together):
    server.take(make.state("dev-a", 1))
    assert row(server)["gone_ms"] is None
    if together:
        server.take(make.state("dev-a", 2), make.state("dev-a", 2, "offline"))
    else:
        server.take(make.state("dev-a", 2))
        server.take(make.state("dev-a", 2, "offline"))
    gone = row(server)["gone_ms"]
    assert gone == server.now_ms
    # A server that starts again is told of the same absence again.
    server.take(make.state("dev-a", 2, "offline", retained=True))
    assert (row(server)["gone_ms"], row(server)["online"]) == (gone, False)
    server.take(make.state("dev-a", 3))
    assert row(server)["gone_ms"] == gone
    server.take(make.state("dev-a", 3, "offline"))
    assert row(server)["gone_ms"] == server.now_ms


def test_a_will_that_is_old_says_nothing_about_when_a_device_went(server, make):
    server.take(make.state("dev-a", 2))
    server.take(make.state("dev-a", 1, "offline"))
    assert (row(server)["gone_ms"], row(server)["online"]) == (None, True)


def test_a_late_copy_of_a_birth_does_not_revive_a_session_that_ended(server, make):
    server.take(make.state("dev-a", 2), make.state("dev-a", 2, "offline"))
    server.take(make.state("dev-a", 2))
    assert not row(server)["online"]
    server.take(make.state("dev-a", 3))
    assert row(server)["online"]


@pytest.mark.parametrize("together", [True, False])
def test_will_and_birth_in_either_batching(server, make, together):
    messages = [
        make.state("dev-a", 1),
        make.state("dev-a", 1, "offline"),
        make.state("dev-a", 2),
        make.state("dev-a", 1, "offline"),
    ]
    if together:
        server.take(*messages)
    else:
        for message in messages:
            server.take(message)
    assert (row(server)["online"], row(server)["birth"]) == (True, 2)


def test_a_replayed_retained_state_is_no_sign_of_life(server, make):
    server.take(make.state("dev-a", 1))
    seen = row(server)["seen_ms"]
    server.take(make.state("dev-a", 1, retained=True, agent="later"))
    assert (row(server)["seen_ms"], row(server)["agent"]) == (seen, "later")


def test_records_are_a_sign_of_life_by_the_servers_clock(server, make):
    server.take(make.state("dev-a", 1))
    server.now_ms += 60_000
    server.take(make.up("dev-a", make.record(1)))
    assert row(server)["seen_ms"] == server.now_ms


def test_a_state_names_an_epoch_the_server_never_saw(server, make):
    server.take(make.state("dev-a", 1, epoch="9" * 32, seq=500))
    assert row(server)["state"]["seq"] == 500


def test_a_revoked_device_says_nothing(server, make):
    server.take(make.state("dev-x", 1))
    assert not server.rows(t.devices, id="dev-x")[0]["online"]
    assert server.counters() == {("dev-x", "foreign"): 1}


def test_an_emptied_retained_state_is_ignored(server, make):
    server.take(make.state("dev-a", 1))
    from skerry_server.mqtt import Message

    server.take(Message("skerry/1/d/dev-a/state", b"", False, 1))
    assert row(server)["online"]


@pytest.mark.parametrize(
    "fields",
    [
        {"stratum": "*"},
        {"stratum": "arm\x1b[2J"},
        {"stratum": "arm\n"},
        {"stratum": "\u202emra"},
        {"agent": "0.1.0\x07"},
    ],
    ids=repr,
)
def test_a_stratum_is_a_name_that_can_be_shown_and_never_the_star_that_means_all_others(server, make, fields):
    server.take(make.state("dev-a", 1, stratum="rpi onnx"))
    server.take(make.state("dev-a", 2, **fields))
    assert (row(server)["birth"], row(server)["stratum"]) == (1, "rpi onnx")


def running(**named):
    return {name: wire.Running(digest="", version=one, variant="cpu", state="trial") for name, one in named.items()}


def test_a_device_says_that_it_runs_sixty_four_models_at_most(server, make):
    server.take(make.state("dev-a", 1, running=running(**{f"m{i}": "1.0.0" for i in range(64)})))
    assert len(row(server)["running"]) == 64
    server.take(make.state("dev-a", 2, running=running(**{f"m{i}": "1.0.0" for i in range(65)})))
    assert (row(server)["birth"], server.rows(t.quarantine)[0]["code"]) == (1, "malformed")
    assert "wanted at most 64 models, got 65" in server.rows(t.quarantine)[0]["detail"]


@pytest.mark.parametrize("said", [{"Gas!": "1.0.0"}, {"": "1.0.0"}, {"gas": "1" * 129}, {"gas": "1.0\x1b[2J"}])
def test_a_model_or_version_that_cannot_be_is_not_shown_to_people(server, make, said):
    server.take(make.state("dev-a", 1, running=running(**said)))
    assert row(server)["running"] == {}
    assert server.rows(t.quarantine)[0]["code"] == "malformed"


@pytest.mark.parametrize("status", ["online", "offline"])
@pytest.mark.parametrize("birth", [(1 << 63) - 1, (1 << 53) + 1, 1 << 33])
def test_a_birth_that_a_broker_made_up_mutes_no_device(server, make, birth, status):
    server.take(make.state("dev-a", 1))
    server.take(make.state("dev-a", birth, status, agent="6.6.6"))
    assert (row(server)["birth"], row(server)["online"]) == (1, True)
    server.take(make.state("dev-a", 2, agent="0.1.0"))
    assert (row(server)["birth"], row(server)["online"], row(server)["agent"]) == (2, True, "0.1.0")


def test_a_birth_that_was_believed_once_is_forgotten(server, make):
    with writing(server.engine) as conn:
        conn.execute(update(t.devices).where(t.devices.c.id == "dev-a").values(birth=(1 << 63) - 1))
    server.take(make.state("dev-a", 3, agent="0.1.0"))
    assert (row(server)["birth"], row(server)["online"]) == (3, True)
