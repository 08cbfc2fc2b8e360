"""Updates on a whole device: real workers, real broker; the repository is a stand-in's folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest
from skerry_agent.core import lifecycle
from skerry_cli.demo import models as demo
from skerry_contract import group

from tests import models, trained
from tests.integration.agent.rig import DEVICE, Device, Load, Server, wait_for


@pytest.fixture
def serving(device: Device, server: Server) -> Device:
    """A device that confirmed 1.0.0."""
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    return device


def digest_of(device: Device, version: str) -> str:
    return next(d for d, folder in device.world["bundles"].items() if folder.endswith(f"-{version}"))


def offer(device: Device, version: str, kind: str = "classifier", **choices: object) -> str:
    """Makes another bundle stable, and lets the device look."""
    digest = device.bundle(version, kind, **choices)
    device.publish(digest)
    device.sync()
    return digest


def test_a_first_bundle_is_fetched_proved_tried_and_confirmed(device: Device, server: Server) -> None:
    digest = device.bundle("1.0.0")
    device.publish(digest)
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0", "confirmed")
    steps = wait_for(
        lambda: (s := [e.data["state"] for e in server.events()]) and s[-1] == "confirmed" and s, why="the events"
    )
    assert steps == ["fetch", "verify", "stage", "prove", "trial", "confirmed"]
    assert wait_for(lambda: server.inferences(bundle=digest) == 25, why=f"25 counted: {server.windows()}")
    state = server.states[-1]
    assert (state.running["gas"].digest, state.running["gas"].state) == (digest, "confirmed")


def test_a_bell_brings_the_next_version_without_a_failed_request(serving: Device, server: Server) -> None:
    second = serving.bundle("1.1.0", seed=1)
    serving.publish(digest_of(serving, "1.0.0"), candidate=second)
    with Load(serving, clients=4) as load:
        wait_for(lambda: load.ok > 20, why="load")
        server.ring(7)
        serving.wait_running("1.1.0", "confirmed")
        wait_for(lambda: load.versions == {"1.0.0", "1.1.0"}, why="both versions")
    assert load.failed == []
    asked = 20 + load.ok
    wait_for(
        lambda: server.inferences() == asked, why=f"{asked} counted, got {server.inferences()}: {serving.log()[-2000:]}"
    )
    assert server.inferences(bundle=second) == server.inferences(arm="candidate", rollout="r-1", stage=0)
    assert server.conflicts == []


def test_a_swap_back_and_forth_loses_and_doubles_nothing(serving: Device, server: Server) -> None:
    first, second = digest_of(serving, "1.0.0"), serving.bundle("1.1.0", seed=1)
    with Load(serving, clients=3) as load:
        for digest, version in ((second, "1.1.0"), (first, "1.0.0"), (second, "1.1.0")):
            serving.publish(digest)
            serving.sync()
            serving.wait_running(version, "confirmed")
    assert load.failed == []
    wait_for(lambda: server.inferences() == 20 + load.ok, why=f"{20 + load.ok} counted, got {server.inferences()}")


def test_the_next_stage_counts_under_its_own_key_without_a_new_worker(serving: Device, server: Server) -> None:
    first, second = digest_of(serving, "1.0.0"), serving.bundle("1.1.0", seed=1)
    serving.publish(first, candidate=second, cut=0)
    serving.sync()
    wait_for(lambda: serving.status()["keys"]["gas"]["arm"] == "control", why="the control key")
    pid = serving.status()["worker"]["pid"]
    serving.infer(5)
    serving.publish(first, candidate=second, stage=1, cut=0)
    serving.sync()
    wait_for(lambda: serving.status()["keys"]["gas"]["stage"] == 1, why="stage 1")
    serving.infer(7)
    wait_for(lambda: server.inferences(arm="control", rollout="r-1", stage=1) == 7, why="7 in stage 1")
    assert server.inferences(arm="control", rollout="r-1", stage=0) == 5
    assert serving.status()["worker"]["pid"] == pid


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("damaged", "model_damaged"),
        ("unknown-operator", "operator_unknown"),
        ("always-one", "golden_failed"),
        ("crash-on-load", "runtime_crashed"),
    ],
)
def test_a_bundle_that_does_not_prove_itself_never_serves(
    serving: Device, server: Server, kind: str, code: str
) -> None:
    with Load(serving) as load:
        bad = offer(serving, "1.1.0", kind)
        update = serving.wait_update("idle", code)
    assert (update["failed_in"], update["digest"]) == ("prove", bad)
    assert (load.failed, load.versions) == ([], {"1.0.0"})
    assert serving.running() == ("1.0.0", "confirmed")
    wait_for(lambda: any(e.code == code and e.data["digest"] == bad for e in server.events()), why="the event")
    if lifecycle.ATTEMPTS[code] == 1:
        # It will not be tried again: it makes room, whether or not anything is ever confirmed again.
        wait_for(lambda: not (serving.state_dir / "slots" / bad).exists(), why="its slot goes")


def test_a_flipped_byte_is_refused_and_given_up_after_three_tries(serving: Device, server: Server) -> None:
    digest = serving.bundle("1.1.0", seed=1)
    serving.world["flip"] = [digest]
    serving.publish(digest)
    serving.sync()
    serving.wait_update("idle", "hash_mismatch")
    wait_for(
        lambda: sum(e.data["state"] == "fetch" and e.data["digest"] == digest for e in server.events()) == 3,
        why="3 tries",
    )
    serving.wait_update("idle", "hash_mismatch")
    for _ in range(3):
        serving.synced()
    assert serving.status()["update"]["attempt"] == 3
    assert serving.running() == ("1.0.0", "confirmed")
    assert not (serving.state_dir / "slots" / digest).exists()


def test_how_far_a_download_is_stands_in_the_status_and_reaches_the_server(serving: Device, server: Server) -> None:
    digest = serving.bundle("1.1.0", seed=1)
    serving.world["slow_fetch"] = {digest: 5.0}
    serving.publish(digest)
    serving.sync()
    seen = wait_for(lambda: (serving.status()["update"] or {}).get("progress"), why="progress")
    assert 0 <= seen["done_bytes"] < seen["size_bytes"]
    later = wait_for(
        lambda: (p := serving.status()["update"]["progress"]) and p["left_s"] is not None and p, why="speed"
    )
    assert later["done_bytes"] > seen["done_bytes"]
    serving.wait_running("1.1.0", "trial")
    assert serving.status()["update"]["progress"] is None
    told = [state.progress for state in server.states if state.progress is not None]
    # Now and then, not with every line of the courier.
    assert 1 <= len(told) <= 5
    assert all(0 < one.done < one.size for one in told)
    assert server.states[-1].progress is None


def test_what_is_still_fetched_of_a_withdrawn_update_ends_and_reaches_no_later_one(
    serving: Device, server: Server
) -> None:
    second, third = serving.bundle("1.1.0", seed=1), serving.bundle("1.2.0", seed=2)
    serving.world["slow_fetch"] = {second: 4.0, third: 6.0}
    serving.publish(second)
    serving.sync()
    agent = psutil.Process(serving.process.pid)  # type: ignore[union-attr]

    def fetching() -> list[psutil.Process]:
        found = []
        for child in agent.children():
            # Other couriers come and go.
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [child] if child.cmdline()[-1:] == ["fetch"] else []
        return found

    (courier,) = wait_for(fetching, why="the courier of 1.1.0")
    serving.publish(third)
    serving.sync()
    wait_for(lambda: not courier.is_running() or courier.status() == psutil.STATUS_ZOMBIE, timeout_s=3.0, why="its end")
    serving.wait_running("1.2.0", "trial")
    serving.infer(20)
    serving.wait_running("1.2.0", "confirmed")
    told = wait_for(
        lambda: (s := [(e.data["version"], e.data["state"], e.code) for e in server.events()])
        and s[-1][1] == "confirmed" and s,
        why="the events",
    )  # fmt: skip
    assert [one for one in told if one[0] == "1.1.0"] == [
        ("1.1.0", "fetch", ""), ("1.1.0", "revert", "withdrawn"), ("1.1.0", "idle", "withdrawn"),
    ]  # fmt: skip
    assert [state for version, state, _ in told if version == "1.2.0"] == [
        "fetch", "verify", "stage", "prove", "trial", "confirmed",
    ]  # fmt: skip


def test_a_person_pardons_a_bundle_that_used_up_its_attempts(serving: Device, server: Server) -> None:
    digest = serving.bundle("1.1.0", seed=1)
    serving.world["flip"] = [digest]
    serving.publish(digest)
    serving.sync()
    wait_for(lambda: serving.status()["update"]["attempt"] == 3 and serving.wait_update("idle", "hash_mismatch"))
    serving.world["flip"] = []
    serving.save()
    serving.synced()
    assert serving.running() == ("1.0.0", "confirmed")
    serving.sync(pardon=True)
    serving.wait_running("1.1.0", "trial", "confirmed")


@pytest.mark.attack("rollback of a model")
def test_a_version_below_the_floor_is_refused_before_any_file_is_fetched(serving: Device, server: Server) -> None:
    serving.world["floors"] = {"gas": "1.0.0"}
    digest = offer(serving, "0.9.0")
    assert serving.wait_update("idle", "below_floor")["failed_in"] == "fetch"
    assert not (serving.state_dir / "slots" / ".staging" / digest).exists()
    assert serving.running() == ("1.0.0", "confirmed")


@pytest.mark.attack("rollback of a model")
def test_a_floor_once_seen_does_not_go_down(serving: Device, server: Server) -> None:
    serving.world["floors"] = {"gas": "1.0.0"}
    offer(serving, "0.9.0")
    serving.wait_update("idle", "below_floor")
    serving.world["floors"] = {}
    offer(serving, "0.9.1")
    serving.wait_update("idle", "below_floor", version="0.9.1")


def test_what_the_courier_rejects_is_reported_with_its_code(serving: Device, server: Server) -> None:
    digest = serving.bundle("1.1.0", seed=1)
    serving.world["errors"] = {"manifest": ["rejected", "bad_signature", "catalog: 0 of 1 signatures"]}
    serving.publish(digest)
    serving.sync()
    serving.wait_update("idle", "bad_signature")
    assert serving.running() == ("1.0.0", "confirmed")
    wait_for(lambda: any(e.code == "bad_signature" for e in server.events()), why="the event")


def test_a_crash_in_the_trial_brings_the_old_version_back_for_good(serving: Device, server: Server) -> None:
    bad = offer(serving, "1.1.0", "crash-on-rows")
    serving.wait_running("1.1.0", "trial")
    with pytest.raises((OSError, AssertionError)):
        serving.infer(1, value=models.CRASH_VALUE + 0.5)
    serving.wait_update("idle", "trial_crashed")
    serving.wait_running("1.0.0", "confirmed")
    assert serving.infer(3) == ["1.0.0"] * 3
    serving.synced()
    serving.synced()
    assert serving.status()["update"]["attempt"] == 1
    wait_for(
        lambda: [e.data["digest"] for e in server.events() if e.code == "trial_crashed"] == [bad, bad], why="events"
    )
    crash = wait_for(lambda: server.events("worker"), why="the worker's event")[0]
    assert crash.data["how"] == "signal 8"


def test_a_first_bundle_that_crashes_on_trial_is_gone_and_the_next_one_serves(device: Device, server: Server) -> None:
    device.publish(device.bundle("1.0.0", "crash-on-rows"))
    device.start()
    device.wait_running("1.0.0", "trial")
    with pytest.raises((OSError, AssertionError)):
        device.infer(1, value=models.CRASH_VALUE + 0.5)
    device.wait_update("idle", "trial_crashed")
    assert device.status()["running"] == {}
    assert device.status()["worker"]["pid"] == 0
    offer(device, "1.1.0")
    device.wait_running("1.1.0", "trial")
    assert device.infer(20) == ["1.1.0"] * 20
    device.wait_running("1.1.0", "confirmed")


def test_a_quiet_trial_is_confirmed_on_its_golden_cases(make_device: object, server: Server) -> None:
    device: Device = make_device(trial_s=0.5)  # type: ignore[operator]
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "confirmed_on_golden")


def test_an_aborted_rollout_ends_the_trial(serving: Device, server: Server) -> None:
    first, second = digest_of(serving, "1.0.0"), serving.bundle("1.1.0", seed=1)
    serving.publish(first, candidate=second)
    serving.sync()
    serving.wait_running("1.1.0", "trial")
    serving.publish(first)
    serving.sync()
    serving.wait_update("idle", "withdrawn")
    serving.wait_running("1.0.0", "confirmed")
    serving.publish(first, candidate=second)
    serving.sync()
    serving.wait_running("1.1.0", "trial")
    # A model that no document names any more is not updated either; what was confirmed goes on.
    serving.publish_models()
    serving.sync()
    serving.wait_update("idle", "withdrawn")
    serving.wait_running("1.0.0", "confirmed")
    assert serving.infer(1) == ["1.0.0"]


def test_a_person_reverts_and_the_bundle_is_not_taken_again(serving: Device, server: Server) -> None:
    offer(serving, "1.1.0", seed=1)
    serving.wait_running("1.1.0", "trial")
    serving.infer(20)
    serving.wait_running("1.1.0", "confirmed")
    assert serving.call("POST", "/skerry/v1/revert", {"model": "gas"}).status == 200
    serving.wait_running("1.0.0", "confirmed")
    serving.wait_update("idle", "reverted_by_operator")
    serving.synced()
    serving.synced()
    assert serving.running() == ("1.0.0", "confirmed")
    assert serving.call("POST", "/skerry/v1/revert", {"model": "gas"}).status == 409


def test_a_document_that_asks_for_more_than_this_agent_changes_nothing(serving: Device, server: Server) -> None:
    digest = serving.bundle("1.1.0", seed=1)
    serving.publish(digest, requires=("teleport",))
    serving.sync()
    wait_for(lambda: any(e.code == "agent_too_old" for e in server.events()), why="the event")
    assert serving.running() == ("1.0.0", "confirmed")
    (told,) = [one for one in serving.call("GET", "/skerry/v1/why").body["told"] if one["code"] == "agent_too_old"]
    assert "teleport" in told["says"]


def test_a_pin_beats_the_group(serving: Device, server: Server) -> None:
    pinned = serving.bundle("1.2.0", seed=2)
    target = group.Target(digest=pinned, version="1.2.0")
    serving.publish(digest_of(serving, "1.0.0"), pins={group.pin_key("g", DEVICE): {"gas": target}})
    serving.sync()
    serving.wait_running("1.2.0", "trial")


def test_an_unreachable_repository_is_tried_again_and_counts_against_nobody(serving: Device, server: Server) -> None:
    digest = serving.bundle("1.1.0", seed=1)
    serving.world["errors"] = {"fetch": ["transient", "unreachable", "connection reset"]}
    serving.publish(digest)
    serving.sync()
    wait_for(lambda: serving.status()["update"]["attempt"] >= 4, why="a fourth try")
    del serving.world["errors"]
    serving.save()
    serving.wait_running("1.1.0", "trial")


def test_a_certificate_past_two_thirds_of_its_life_is_renewed_once_and_the_session_goes_on(
    serving: Device, server: Server
) -> None:
    birth = serving.status()["link"]["birth"]
    serving.world["renew_at_s"] = 1.0
    serving.save()
    serving.sync()
    wait_for(lambda: server.events("certificate"), why="the event")
    wait_for(lambda: serving.status()["link"]["birth"] > birth, why="a new session")
    serving.synced()
    serving.infer(2)
    assert [e.data["expires_s"] for e in server.events("certificate")] == [4_000_000_000]


def test_a_server_that_refuses_the_device_is_told_of_once(serving: Device, server: Server) -> None:
    serving.world["self_error"] = {"kind": "rejected", "code": "unknown_device", "detail": "revoked"}
    serving.save()
    for _ in range(3):
        serving.synced()
    wait_for(lambda: server.events("membership"), why="the event")
    assert [e.code for e in server.events("membership")] == ["unknown_device"]


def test_a_server_that_is_not_reached_refuses_nobody_and_takes_no_refusal_back(serving: Device, server: Server) -> None:
    def told(kind: str, code: str) -> str:
        serving.world["self_error"] = {"kind": kind, "code": code, "detail": ""}
        serving.save()
        serving.synced()
        return str(serving.status()["sync"]["membership"])

    assert told("transient", "unreachable") == ""
    assert told("rejected", "revoked") == "revoked"
    assert told("transient", "timeout") == "revoked"


BROKEN_LITERT = """
raise ImportError("numpy.core.multiarray failed to import: built for another numpy")
"""


def start_with_broken_litert(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the agent starts has a LiteRT that is installed and does not import, in front of the one that does."""
    package = tmp_path / "broken" / "ai_edge_litert"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "interpreter.py").write_text(BROKEN_LITERT)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")
    device.start()


def offer_both_variants(device: Device, *, prefer: str) -> None:
    made = trained.make_bundle(device.folder / "bundle-1.0.0", version="1.0.0", batches=(1,))
    device.world["bundles"][made.bundle.digest] = str(made.bundle.folder)
    device.publish(made.bundle.digest)
    text = device.config.read_text().replace("trial_s = 120", "trial_s = 0.5")
    device.config.write_text(f"{text}[device]\nruntimes = {prefer}\n")


def test_a_device_whose_preferred_runtime_is_broken_takes_the_variant_that_runs_and_says_so(
    device: Device, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_both_variants(device, prefer='["tflite", "onnx"]')
    start_with_broken_litert(device, tmp_path, monkeypatch)
    device.wait_running("1.0.0", "confirmed_on_golden")
    assert device.status()["running"]["gas"]["variant"] == demo.ONNX
    wait_for(lambda: device.status()["outbox"]["pending"] == 0, why="all events")
    told = [
        (event.data["state"], event.data["variant"], event.code)
        for event in server.events()
        if event.data["state"] in ("prove", "idle")
    ]
    assert told == [("prove", demo.TFLITE, ""), ("idle", demo.TFLITE, "runtime_missing"), ("prove", demo.ONNX, "")]
    assert "numpy.core.multiarray failed to import" in device.log()
    state = wait_for(
        lambda: (last := server.states[-1]) and last.running["gas"].state == "confirmed_on_golden" and last, why="it"
    )
    assert list(state.runtimes) == ["onnx"]
    assert state.stratum.endswith(".tflite>onnx")


def test_a_bundle_that_only_a_broken_runtime_would_run_is_refused_as_such(
    device: Device, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_both_variants(device, prefer='["tflite"]')
    start_with_broken_litert(device, tmp_path, monkeypatch)
    wait_for(
        lambda: (update := device.status()["update"]) and "wants tflite, which does not work here" in update["detail"],
        why=lambda: f"the next try: {device.status()['update']}",
    )
    assert device.wait_update("idle", "runtime_missing")["failed_in"] == "fetch"
    assert device.status()["running"] == {}


def test_a_person_cancels_an_update_in_its_trial_and_it_is_not_tried_again_before_a_pardon(
    serving: Device, server: Server
) -> None:
    offer(serving, "1.1.0", seed=1)
    serving.wait_running("1.1.0", "trial")
    with Load(serving, clients=1) as load:
        answer = serving.call("POST", "/skerry/v1/cancel", {})
        assert (answer.status, answer.body["version"]) == (200, "1.1.0")
        serving.wait_running("1.0.0", "confirmed")
    assert load.failed == []
    update = serving.wait_update("idle", "cancelled")
    assert (update["failed_in"], update["detail"]) == ("trial", "cancelled by a person at the device")
    serving.synced()
    serving.synced()
    assert serving.running() == ("1.0.0", "confirmed")
    refused = serving.call("POST", "/skerry/v1/cancel", {})
    assert (refused.status, refused.body["code"]) == (409, "nothing_to_cancel")
    serving.sync(pardon=True)
    serving.wait_running("1.1.0", "trial")


def test_what_waits_for_its_next_try_can_be_cancelled_too(make_device: object, server: Server) -> None:
    device: Device = make_device(backoff_scale=1000)  # type: ignore[operator]
    device.publish(device.bundle("1.0.0"))
    device.world["errors"] = {"fetch": ["transient", "unreachable", "connection reset"]}
    device.save()
    device.start()
    device.wait_update("idle", "unreachable")
    assert device.call("POST", "/skerry/v1/cancel", {}).status == 200
    del device.world["errors"]
    device.save()
    device.synced()
    assert device.status()["running"] == {}
    device.sync(pardon=True)
    device.wait_running("1.0.0", "trial")


def order(device: Device, **orders: int) -> None:
    """The server orders it; the device looks."""
    device.world["membership"] = {"group": "g", "tags": {}, "version": 1, "orders": orders}
    device.save()
    device.synced()


def test_an_operators_order_arrives_while_the_metadata_cannot_be_refreshed(serving: Device) -> None:
    offer(serving, "1.1.0", seed=1)
    serving.wait_running("1.1.0", "trial")
    serving.world["errors"] = {"sync": ["rejected", "expired", "timestamp expired"]}
    serving.world["membership"] = {"group": "g", "tags": {}, "version": 1, "orders": {"cancel": 7}}
    serving.save()
    serving.sync()
    assert serving.wait_update("idle", "cancelled")["detail"] == "cancelled by an operator"


def test_an_operators_orders_are_obeyed_once_over_restarts(serving: Device, server: Server) -> None:
    offer(serving, "1.1.0", seed=1)
    serving.wait_running("1.1.0", "trial")
    order(serving, cancel=7)
    assert serving.wait_update("idle", "cancelled")["detail"] == "cancelled by an operator"
    serving.wait_running("1.0.0", "confirmed")
    serving.kill()
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    # The next order comes with the old one, which is not obeyed again.
    order(serving, cancel=7, retry=9, later_kind=3)
    serving.wait_running("1.1.0", "trial")
    order(serving, cancel=7, retry=9)
    serving.infer(20)
    serving.wait_running("1.1.0", "confirmed")
    wait_for(lambda: len(server.events("order")) == 2, why="the events")
    told = [(event.data["kind"], event.data["number"], event.code) for event in server.events("order")]
    assert told == [("cancel", 7, ""), ("retry", 9, "")]
    order(serving, cancel=11)
    wait_for(lambda: server.events("order")[-1].code == "nothing_to_cancel", why="that there is nothing to end")
    assert serving.running() == ("1.1.0", "confirmed")
