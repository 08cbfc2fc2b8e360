"""What applications tell and what the server counted, held against each other after a round of kills."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from skerry_cli.demo.application import Counts

Tally = Counter[tuple[str, ...]]
_BROKEN = ("ConnectionResetError", "RemoteDisconnected", "BrokenPipeError", "IncompleteRead", "ConnectionAbortedError")
_REFUSED = "ConnectionRefusedError"


@dataclass(kw_only=True)
class Totals:
    """What a run did and counted."""

    rounds: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    answered: int = 0
    counted: int = 0
    cut_off_and_counted: int = 0
    refused: int = 0
    broken: int = 0
    labels: int = 0
    labelled: int = 0
    labels_sent_again: int = 0
    pardons: int = 0
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        span = f"{min(self.seconds):.0f} to {max(self.seconds):.0f} s each, {sum(self.seconds):.0f} s in all"
        cut_off = f"{self.broken} cut off by a kill, of which {self.cut_off_and_counted} had been counted"
        lines = [
            f"rounds: {sum(self.rounds.values())} ({_told(self.rounds)}), {span}",
            f"kills: {sum(self.kills.values())} ({_told(self.kills)})",
            f"hit: {_told(self.hit)}",
            f"requests: {self.attempts} asked, {self.answered} answered, {self.counted} counted",
            f"  {cut_off}; {self.refused} refused while a supervisor was down",
            f"labels: {self.labels} matched, {self.labelled} counted, {self.labels_sent_again} requests sent again",
            f"pardons after a kill on trial: {self.pardons}",
        ]
        return "\n".join(lines)

    def add(self, told: Tally, here: Tally) -> None:
        """One device's part of a round, once it was held against the server's."""
        answered, failed = sum_of(told, "answered"), sum_of(told, "failed")
        self.attempts += answered + failed
        self.answered += answered
        self.counted += sum_of(here, "ok")
        self.cut_off_and_counted += sum_of(here, "ok") - answered
        self.refused += told["failed", _REFUSED]
        self.broken += failed - told["failed", _REFUSED]
        self.labels += told["label", "matched"]
        self.labelled += sum_of(here, "labelled")
        self.labels_sent_again += told["labels sent again",]


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))


def tally(counts: Counts) -> Tally:
    """What an application counted, as numbers that can be taken from one another."""
    found: Tally = Counter({("labels sent again",): counts.label_retries})
    found.update({("answered", version): n for version, (n, _) in counts.versions.items()})
    found.update({("failed", name): n for name, n in counts.failed_by.items()})
    found.update({("label", outcome): n for outcome, n in counts.labels.items()})
    found.update({("matched", version): n for version, n in counts.matched.items()})
    return found


def sum_of(counts: Tally, *first: str) -> int:
    """Sum over all keys that begin so."""
    return sum(n for key, n in counts.items() if key[: len(first)] == first)


@dataclass(frozen=True, kw_only=True)
class Filing:
    """How a round's counts must be filed.

    Attributes:
        candidate: version of the round's candidate; rollout: its id; completed: whether everyone ended on it.
        seen: answers of the candidate that an application had told of while its agent still filed under the candidate's arm.
    """

    candidate: str
    rollout: str
    completed: bool
    seen: int = 0


def hold_filing(here: Tally, filing: Filing) -> None:
    """One device, one round: what the judge reads stands where it belongs.

    The candidate of a rollout answers as ``candidate`` of that rollout and under no other key, until the rollout is completed; what
    others run is ``control`` of it, or of no arm before the rollout is heard of, after its end, and on a device that went back.

    Args:
        here: what the server counted, answers and labels alike, by ("filed", version, arm, rollout, stage).
    """
    filed = {key[1:]: n for key, n in here.items() if key[0] == "filed" and n}
    for version, arm, rollout, stage in filed:
        wanted = ("candidate",) if version == filing.candidate else ("control", "none")
        if version == filing.candidate and filing.completed:
            wanted = ("candidate", "none")
        what = f"filed as {version} {arm} of {rollout or 'no rollout'}, stage {stage}; wanted {wanted} of {filing.rollout}: {filed}"
        assert arm in wanted, f"under the wrong arm: {what}"
        assert rollout == ("" if arm == "none" else filing.rollout), f"under the wrong rollout: {what}"
        assert arm != "none" or stage == "0", f"under a stage of no rollout: {what}"
    kept = sum(n for key, n in here.items() if key[:3] == ("answers", filing.candidate, "candidate"))
    assert kept >= filing.seen, (
        f"the judge was robbed: {filing.seen} answers of the candidate were seen, {kept} filed: {filed}"
    )


def hold_against(told: Tally, here: Tally, kills: Counter[str]) -> None:
    """One device, one round: nothing lost, nothing doubled, and no request failed that a kill does not account for.

    Args:
        told: by the application, as ``tally`` gives it; here: what the server counted, by (name, version).
        kills: of the device's parts.
    """
    what = f"the application tells {dict(told)}, the server counted {dict(+here)}, kills {dict(kills)}"
    lost = {
        key[1]: n - here["ok", key[1]] for key, n in told.items() if key[0] == "answered" and here["ok", key[1]] < n
    }
    assert not lost, f"lost answers, by version: {lost}; {what}"
    refused, broken = told["failed", _REFUSED], sum(told["failed", name] for name in _BROKEN)
    assert refused + broken == sum_of(told, "failed"), f"failures of another kind; {what}"
    # A kill takes one request with it, the one in work: the application has one connection. A supervisor takes its worker.
    # With it goes the socket that listened, and with that one a connection that nobody had taken up.
    assert broken <= kills["worker"] + 2 * kills["supervisor"], f"more requests were cut off than kills can; {what}"
    assert refused == 0 or kills["supervisor"], f"refused although the supervisor lived; {what}"
    surplus = sum_of(here, "ok") - sum_of(told, "answered")
    assert surplus <= broken, f"counted twice: {surplus} more than answered, {broken} may; {what}"
    assert not any(sum_of(here, name) for name in ("invalid", "failed", "shed")), f"not answered well; {what}"
    matched = told["label", "matched"]
    assert sum_of(told, "label") == matched, f"a label was not taken for what it was; {what}"
    assert matched == sum_of(here, "labelled"), f"labels lost or doubled; {what}"
    versions = {key[1]: n for key, n in told.items() if key[0] == "matched"}
    counted = {key[1]: n for key, n in here.items() if key[0] == "labelled" and n}
    assert versions == counted, (
        f"labels counted under a version that did not answer: {versions}, counted {counted}; {what}"
    )
