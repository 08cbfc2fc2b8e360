"""A device comes to rest, whatever the document says, whatever it has to refuse, and whenever it refuses it."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_agent.core import plan as p
from skerry_contract import group, ids

DEVICE = ids.device_id("line1-cell04")
VERSIONS = ("1.0.0", "2.0.0", "2.5.0", "3.0.0")
LOOKS = 12
TARGETS = {
    version: group.Target(digest=format(place + 1, "064x"), version=version) for place, version in enumerate(VERSIONS)
}
VERSION_OF = {target.digest: version for version, target in TARGETS.items()}
DIGESTS = sorted(VERSION_OF)

targets = st.sampled_from(sorted(TARGETS.values(), key=lambda target: target.version))
plans = st.builds(
    group.ModelPlan,
    stable=targets,
    fallback=st.none() | targets,
    rollout=st.none()
    | st.builds(
        group.Rollout, id=st.just("r"), stage=st.just(0), candidate=targets, salt=st.just("0" * 32), cuts=st.just({"*": str(group.EVERYONE)})
    ),
    via=st.lists(targets, max_size=2, unique=True).map(tuple),
)  # fmt: skip


def document(plan: group.ModelPlan, pin: group.Target | None = None) -> group.GroupDocument:
    pins = {} if pin is None else {group.pin_key("g", DEVICE): {"gas": pin}}
    return group.GroupDocument(schema=1, group="g", generation=1, models={"gas": plan}, pins=pins)


def carried_out(
    doc: group.GroupDocument, began: str, cannot: Collection[str], refused: Sequence[Collection[str]]
) -> list[str]:
    """The versions that a device confirmed one after the other, over looks at which it refuses this and that; it never can run ``cannot``."""
    running = p.Running(digest=began, confirmed=VERSION_OF[began])
    passed: list[str] = []
    for now in refused:
        (step,) = p.plan(doc, DEVICE, "x", {"gas": running}, now)
        if isinstance(step, p.Change) and step.digest not in cannot:
            running = p.Running(
                digest=step.digest, arm=step.arm, rollout=step.rollout, stage=step.stage, confirmed=step.version
            )
            passed.append(step.version)
    return passed


@settings(max_examples=150)
@given(
    plans, st.none() | targets, st.sampled_from(DIGESTS), st.sets(st.sampled_from(DIGESTS)), st.none() | st.integers(0)
)
def test_a_plan_that_is_carried_out_comes_to_an_end_for_every_document_and_whatever_is_refused(
    plan: group.ModelPlan, pin: group.Target | None, began: str, cannot: set[str], knows: int | None
) -> None:
    """``knows``: which of those that it cannot run it refuses at which look, a bit each; None: all, always.

    A refusal for want of room is over after a while, and the bundle is tried again.
    """
    chance = random.Random(knows)
    refused = [{one for one in cannot if knows is None or chance.random() < 0.5} for _ in range(LOOKS)]
    passed = carried_out(document(plan, pin), began, cannot, refused)
    assert len(passed) == len(set(passed)), passed


def test_a_device_on_its_way_up_stays_there_while_what_it_goes_up_to_is_refused() -> None:
    rollout = group.Rollout(
        id="r", stage=0, candidate=TARGETS["3.0.0"], salt="0" * 32, cuts={"*": str(group.EVERYONE)}
    )  # fmt: skip
    doc = document(group.ModelPlan(stable=TARGETS["1.0.0"], rollout=rollout, via=(TARGETS["2.0.0"],)))
    last = TARGETS["3.0.0"].digest
    for refused, began, passed in (
        ([], "1.0.0", ["2.0.0", "3.0.0"]),
        # Nobody sets out for what is refused.
        ([last], "1.0.0", []),
        ([last], "2.0.0", []),
        ([], "2.0.0", ["3.0.0"]),
        ([TARGETS["2.0.0"].digest, last], "2.0.0", ["1.0.0"]),
    ):
        assert carried_out(doc, TARGETS[began].digest, [last], [refused] * LOOKS) == [
            version for version in passed if version != "3.0.0"
        ]
