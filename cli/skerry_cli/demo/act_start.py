"""Before the steps: server, ceremony, sixteen enrolled devices."""

from __future__ import annotations

from skerry_cli.demo.application import TRUTH_AFTER_S
from skerry_cli.demo.fleet import RATE
from skerry_cli.demo.run import Run

_AT_ONCE = 4
_TFLITE_ONE_IN = 4


def start(run: Run, *, devices: int) -> None:
    """Starts everything. The last device has the mirror, every other a cable that can be cut."""
    fleet, screen = run.fleet, run.screen
    screen.heading("The fleet")
    screen.progress("starting the server")
    server = fleet.start_server()
    screen.say(f"The server runs at {server.url}, its embedded MQTT broker (mutual TLS) on port {server.mqtt_port}.")
    ceremony = fleet.hold_ceremony(run.now())
    screen.say(
        f"Key ceremony with throwaway keys in {fleet.folder / 'keys'}: root, targets, approver. root.json is "
        f"{ceremony.root_sha256[:12]}; each device gets this in its one-time token and trusts no other."
    )
    names = [f"gas-{i:02d}" for i in range(1, devices + 1)]
    fleet.start_cables(names[:-1])
    fleet.start_mirror(names[-1])
    # One in four, and never the first or the last two, which later acts use for what they show on ONNX.
    fleet.tflite = frozenset(names[1::_TFLITE_ONE_IN][: devices // _TFLITE_ONE_IN])
    for first in range(0, devices, _AT_ONCE):
        part = names[first : first + _AT_ONCE]
        screen.progress(f"enrolling {part[0]} to {part[-1]}")
        for name in part:
            fleet.enrol(name)
        for name in part:
            fleet.finish_enrolment(name)

    def online() -> bool:
        n = sum(bool(item["online"]) for item in fleet.listed().values())
        screen.progress(f"{n} of {devices} devices online")
        return n == devices

    fleet.wait("all devices to be online", online, 90.0)
    screen.say(
        f"{devices} agents run as daemons of their own, enrolled with one-time tokens, all online. {', '.join(sorted(fleet.tflite))} "
        f"run{'s' if len(fleet.tflite) == 1 else ''} TFLite and nothing else, the others ONNX: each device's configuration says so, and "
        "the device picks the variant."
    )
    fleet.change_world(1)
    for name in names:
        fleet.start_application(name)
    soonest, latest = TRUTH_AFTER_S
    screen.say(
        f"On each device an application asks its own agent about {RATE:g} times a second, with rows of batch {fleet.batch} "
        f"drawn at random with replacement (seed {fleet.seed}), and tells it the truth {soonest:g} to {latest:g} s after each answer. It never "
        "repeats an inference. It waits for the first model."
    )
