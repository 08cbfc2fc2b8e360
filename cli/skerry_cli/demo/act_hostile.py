"""Step 5: four bad bundles, each offered to a device; refused or reverted with a reason, while the device keeps serving."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from skerry_cli import catalog
from skerry_cli.client import quote
from skerry_cli.demo import data, forgery, models, sabotage
from skerry_cli.demo.act_rollouts import make
from skerry_cli.demo.fleet import GROUP
from skerry_cli.demo.models import MODEL
from skerry_cli.demo.run import FIRST, SECOND, Refusal, Run
from skerry_cli.errors import CliError

CRASHING = "4.0.0"
_WAIT_S = 45.0
_MORE_ANSWERS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One attempt: what is offered, to which device, the code it must be refused with, and how it is offered."""

    what: str
    device: str
    code: str
    make: Callable[[], None]


def hostile(run: Run) -> None:
    """Step 5."""
    fleet, screen = run.fleet, run.screen
    screen.heading("5. Four bad bundles")
    mirrored, crashing = fleet.mirrored, fleet.devices[0]
    screen.say(f"{mirrored} gets its updates through a mirror that lies, and that holds the server's own keys.")
    thief = forgery.Thief(fleet.server.data / "repository", fleet.overlay, fleet.server.data / "keys" / "online.pem")

    bases = [file for made in run.bundles.values() for file in made.bundle.manifest.files()]
    good = make(run, "2.1.0", (1, 2, 3), seed=1)
    run.publish(good, quietly=True)
    blob = next(file for file in good.bundle.manifest.files() if file.path.endswith(".onnx"))

    def flipped() -> None:
        place = forgery.flip_byte(fleet.server.data / "repository", fleet.overlay, blob, bases=bases)
        screen.say(
            f"(a) {mirrored} is pinned to {good.bundle.manifest.version}, approved and sound; the mirror flips byte {place} of its model."
        )
        _pin(run, mirrored, good.bundle.digest)

    _offer(run, Offer(what="one byte flipped on the way", device=mirrored, code="mirror_wrong", make=flipped))
    _unpin(run, mirrored)
    fleet.be_honest()

    stolen = models.make_bundle(
        fleet.folder / "bundles" / "9.0.0", version="9.0.0", batches=(1,), created=run.created()
    )

    def unknown_key() -> None:
        keyid = thief.approve_and_pin(stolen.bundle, group=GROUP, device=mirrored, now=run.now())
        screen.say(
            f"(b) The mirror offers 9.0.0 in a catalog signed by the unknown key {keyid[:8]}, under a snapshot and a timestamp "
            "signed with the server's stolen online key."
        )
        fleet.sync(mirrored)

    _offer(run, Offer(what="signed by an unknown key", device=mirrored, code="bad_signature", make=unknown_key))
    fleet.be_honest()
    fleet.approver.change(catalog.Change(floors={MODEL: SECOND}), now=run.now())
    screen.say(f"(c) The approver raises the floor of {MODEL} to {SECOND}; the mirror is honest again.")
    # The snapshot that named the forged catalog was signed with the true online key, so the device holds its versions now.
    _heal(run, thief)

    def below_floor() -> None:
        try:
            _pin(run, mirrored, run.bundles[FIRST].bundle.digest)
            screen.say(f"    {mirrored} is pinned to {FIRST}, which the catalog still lists.")
        except CliError as error:
            screen.say(f"    The server itself refuses to pin {FIRST}: {error.message}.")
            thief.pin(run.bundles[FIRST].bundle, group=GROUP, device=mirrored, now=run.now())
            screen.say(
                f"    So the thief signs a group document that pins {mirrored} to {FIRST}, which the catalog still lists."
            )
            fleet.sync(mirrored)

    _offer(run, Offer(what="below the floor", device=mirrored, code="below_floor", make=below_floor))
    fleet.be_honest()
    _unpin(run, mirrored)
    _heal(run, thief)

    if platform.machine() not in sabotage.DEADLY_ON:
        run.notes.expected_refusals -= 1
        screen.say(
            f"(d) is left out: the bundle that crashes its runtime crashes on x86 processors only, this is {platform.machine()}."
        )
        return
    live = data.load([fleet.batch])
    bad, trigger = models.make_crashing_bundle(
        fleet.folder / "bundles" / CRASHING, version=CRASHING, batches=(1,), live=live, created=run.created()
    )
    run.publish(bad, quietly=True)
    began = time.time()

    def crash() -> None:
        screen.say(
            f"(d) {crashing} is pinned to {CRASHING}: valid, approved, its golden proof holds, but {trigger.share:.0%} of the live rows make its "
            "runtime overflow an integer division and die (SIGFPE)."
        )
        _pin(run, crashing, bad.bundle.digest)

    _offer(run, Offer(what="crashes its runtime", device=crashing, code="trial_crashed", make=crash))
    run.notes.crash = (crashing, began, time.time() + 1.0)
    _unpin(run, crashing)


def _offer(run: Run, offer: Offer) -> None:
    fleet, screen = run.fleet, run.screen
    device = offer.device
    seen = max((int(event["id"]) for event in fleet.events(device)), default=0)
    kept, _ = fleet.running(fleet.device(device))
    before = fleet.counts(device).answered
    offer.make()

    def refused() -> dict[str, Any] | None:
        new = [event for event in fleet.events(device) if int(event["id"]) > seen and event["code"]]
        screen.progress(f"waiting for {device}; it says {', '.join(event['code'] for event in new) or 'nothing yet'}")
        return next((event for event in new if event["code"] == offer.code), None)

    event = fleet.wait(f"{device} to refuse with {offer.code}", refused, _WAIT_S)
    detail = str((event.get("data") or {}).get("detail", ""))

    def serving() -> bool:
        version, state = fleet.running(fleet.device(device))
        more = fleet.counts(device).answered - before
        screen.progress(f"{device} runs {version} ({state}), {more} answers since")
        return more >= _MORE_ANSWERS and version == kept and state.startswith("confirmed")

    fleet.wait(f"{device} to serve {kept} again", serving, _WAIT_S)
    since = fleet.counts(device).answered - before
    run.notes.refusals.append(
        Refusal(offered=offer.what, device=device, code=offer.code, detail=detail, kept=kept, answered_since=since)
    )
    run.must(kept == SECOND, f"{device} runs {SECOND} before and after; it runs {kept}")
    screen.say(
        f"    {device}: {offer.code}{f' ({detail})' if detail else ''}. It runs {kept} and gave {since} answers since.",
        style="green",
    )


def _pin(run: Run, device: str, digest: str) -> None:
    run.fleet.api.put(f"/api/v1/devices/{quote(device)}/pins/{MODEL}", {"digest": digest, "reason": "demo, step 5"})


def _unpin(run: Run, device: str) -> None:
    if MODEL in run.fleet.device(device).get("pins", {}):
        run.fleet.api.delete(f"/api/v1/devices/{quote(device)}/pins/{MODEL}")


def _published(thief: forgery.Thief, before: int) -> bool:
    return thief.real_version() > before


def _heal(run: Run, thief: forgery.Thief) -> None:
    """The server publishes on until its versions are above the forged ones, as one restored after a theft does."""
    fleet = run.fleet
    settings = dict(fleet.api.get(f"/api/v1/groups/{GROUP}")["settings"])
    for extra in range(1, 20):
        if not thief.is_ahead():
            break
        before = thief.real_version()
        fleet.api.put(f"/api/v1/groups/{GROUP}", {"settings": {**settings, "sync_s": settings["sync_s"] + extra}})
        fleet.wait("the server to publish", partial(_published, thief, before), 20.0, every_s=0.05)
    fleet.sync(fleet.mirrored)
