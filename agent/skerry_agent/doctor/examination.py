"""All checks, in the order in which their findings help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from skerry_agent.config import load
from skerry_agent.doctor import access, applications, device, models, network
from skerry_agent.doctor.finding import Finding, Patient
from skerry_agent.errors import BadConfig

CHECKS: tuple[tuple[str, Callable[[Patient], Iterator[Finding]]], ...] = (
    ("agent", device.check_agent),
    ("address", device.check_address),
    ("state folder", device.check_state),
    ("store", device.check_store),
    ("clock", device.check_clock),
    ("identity", device.check_identity),
    ("root of trust", device.check_root),
    ("slots", models.check_slots),
    ("runtime", models.check_runtime),
    ("access", access.check_access),
    ("worker", models.check_worker),
    ("engine", models.check_engines),
    ("applications", applications.check_applications),
    ("update", models.check_update),
    ("fleet", network.check_fleet),
    ("server", network.check_server),
    ("broker", network.check_broker),
)


def examine(path: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    """All findings, as they come: the network's take seconds.

    Args:
        path: of the configuration.
        environment: overrides, as for the agent.
    """
    try:
        patient = Patient(config=load(path, environment))
    except BadConfig as error:
        yield Finding(check="configuration", verdict="fail", detail="; ".join(error.faults), advice=f"correct {path}")
        return
    yield Finding(check="configuration", verdict="ok", detail=str(path))
    for name, check in CHECKS:
        try:
            yield from check(patient)
        except Exception as error:
            # Whatever is wrong with this device, the other checks still say what they see.
            yield Finding(check=name, verdict="fail", detail=f"cannot be checked: {type(error).__name__}: {error}")
