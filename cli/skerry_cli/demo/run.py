"""One run of the demo as its acts see it: the fleet, the screen, the bundles made so far, and what is noted for the summary."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from skerry_cli import catalog, publishing
from skerry_cli.client import quote
from skerry_cli.demo.fleet import GROUP, Fleet
from skerry_cli.demo.models import MODEL, Made
from skerry_cli.demo.screen import Screen
from skerry_cli.errors import Failed

FIRST, SECOND, THIRD = "1.0.0", "2.0.0", "3.0.0"
ENDED = ("completed", "rolled_back", "aborted")
_TOLD = {
    "start": "starts",
    "advance": "goes to the next stage",
    "complete": "has passed its last stage",
    "finish": "is complete",
    "pause": "is paused",
    "hold": "waits",
    "roll_back": "goes back",
    "rolled_back": "is rolled back",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Something that a device refused or went back from: what was offered, to whom, the reason code and its words."""

    offered: str
    device: str
    code: str
    detail: str
    kept: str
    answered_since: int


@dataclass(slots=True, kw_only=True)
class Notes:
    """What the acts leave for the reckoning.

    Attributes:
        broken: invariants that did not hold, in words.
        rollouts: ids in order; first_stage: devices that ran the candidate in the second rollout's first stage.
        away: (device, digest) of bundles that were offered while the device had no network.
        steps: accuracy as the server showed it, per step of the story and version.
        drift: what was raised, and when; judged: per rollout what the judge said; bad_version: how the third model ended.
        expected_refusals: one less on a processor on which the crashing bundle does not crash.
        crash: (device, from, to) in seconds since 1970: failures of that device in between are the crashing bundle's.
        offline: what happened to the device without a network.
    """

    broken: list[str] = field(default_factory=list)
    rollouts: list[str] = field(default_factory=list)
    first_stage: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    crash: tuple[str, float, float] | None = None
    expected_refusals: int = 4
    offline: dict[str, Any] = field(default_factory=dict)
    away: set[tuple[str, str]] = field(default_factory=set)
    steps: list[dict[str, Any]] = field(default_factory=list)
    drift: dict[str, Any] = field(default_factory=dict)
    judged: dict[str, dict[str, Any]] = field(default_factory=dict)
    bad_version: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Run:
    """See the module. ``now``: wall clock, UTC."""

    fleet: Fleet
    screen: Screen
    now: Callable[[], dt.datetime]
    notes: Notes = field(default_factory=Notes)
    bundles: dict[str, Made] = field(default_factory=dict)

    def created(self) -> str:
        """The time for a manifest."""
        return self.now().strftime("%Y-%m-%dT%H:%M:%SZ")

    def publish(self, made: Made, *, quietly: bool = False) -> None:
        """Push, validation by the server, approval with the offline key.

        Raises:
            Failed: the server rejects the bundle.
        """
        manifest = made.bundle.manifest
        pushed = publishing.push(self.fleet.api, made.bundle)
        if pushed.state not in ("validated", "approved"):
            raise Failed(f"the server calls {manifest.version} {pushed.state}: {pushed.reason}")
        addition = catalog.Addition(
            model=manifest.model, version=manifest.version, digest=made.bundle.digest, submitter="admin"
        )
        proposal = self.fleet.approver.change(
            catalog.Change(add=(addition,)), now=self.now(), folder=made.bundle.folder
        )
        self.bundles[manifest.version] = made
        if not quietly:
            self.screen.say(
                f"Pushed; the server ran it in a child process and found it valid. Approved with the offline key: catalog "
                f"version {proposal.difference.to_version} lists {MODEL} {manifest.version} ({made.bundle.digest[:12]})."
            )

    def roll_out(
        self,
        version: str,
        stages: list[dict[str, Any]],
        rollout_id: str,
        *,
        judge: dict[str, Any] | None = None,
        end: str = "completed",
        meanwhile: Callable[[dict[str, Any]], None] = lambda _rollout: None,
    ) -> None:
        """Starts a rollout and tells what the orchestrator decides until it has ended.

        Args:
            end: the state in which it must end.
            meanwhile: called with the rollout as it stands, again and again.

        Raises:
            Failed: it ends in another.
        """
        api = self.fleet.api
        body = {
            "id": rollout_id,
            "group": GROUP,
            "model": MODEL,
            "candidate": self.bundles[version].bundle.digest,
            "stages": stages,
            "gates": {"max_error_rate": 0.01, "latency_p95_ms": 1000.0},
            "stratified": True,
            "judge": judge,
        }
        api.post("/api/v1/rollouts", body)
        self.notes.rollouts.append(rollout_id)
        shown: set[int] = set()

        def ended() -> dict[str, Any] | None:
            for decision in api.items(f"/api/v1/rollouts/{quote(rollout_id)}/decisions"):
                if decision["id"] not in shown and decision["action"] != "hold":
                    verdict = f" [{decision['verdict']}]" if decision["verdict"] else ""
                    done = _TOLD.get(decision["action"], decision["action"])
                    self.screen.say(
                        f"Orchestrator{verdict}: {rollout_id} {done}, because: {decision['reason']}.", style="cyan"
                    )
                shown.add(decision["id"])
            now = dict(api.get(f"/api/v1/rollouts/{quote(rollout_id)}"))
            meanwhile(now)
            if now["state"] == "paused":
                raise Failed(f"rollout {rollout_id} is paused: {now['reason']}")
            self.screen.progress(f"stage {now['stage'] + 1}: {now.get('now', {}).get('reason', now['state'])}")
            return now if now["state"] in ENDED else None

        now = self.fleet.wait(f"rollout {rollout_id} to end", ended, 240.0, every_s=0.5)
        if now["state"] != end:
            raise Failed(f"rollout {rollout_id} is {now['state']}: {now['reason']}")

    def must(self, holds: bool, invariant: str) -> None:
        """Notes an invariant that does not hold; the run goes on and fails at its end."""
        if not holds:
            self.notes.broken.append(invariant)
            self.screen.say(f"NOT TRUE: {invariant}", style="bold red")
