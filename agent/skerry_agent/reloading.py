"""Takes up a changed configuration file without a restart, as far as that goes.

A file that cannot be used changes nothing. What the running agent cannot take over is named, and waits for its restart; the
frozen tree that it goes on with is the old one with the new values of the other keys.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skerry_agent.config import Config, load
from skerry_agent.core.reload import Changes, judge_reload
from skerry_agent.logs import kv

log = logging.getLogger(__name__)


def read_again(running: Config, path: Path, environment: Mapping[str, str]) -> tuple[Config, Changes]:
    """What to go on with, and what changed in the file since.

    Raises:
        BadConfig: the file cannot be used; with every fault.
    """
    found = load(path, environment)
    changes = judge_reload(by_key(running), by_key(found))
    log.info(
        "configuration read again",
        extra=kv(live=",".join(changes.live), next_worker=",".join(changes.next_worker), restart=",".join(changes.restart)),
    )  # fmt: skip
    return merged(running, found, changes), changes


def by_key(config: Config) -> dict[str, Any]:
    """A tree's values by dotted key."""
    found: dict[str, Any] = {"state_dir": str(config.state_dir)}
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        if dataclasses.is_dataclass(part):
            for key in dataclasses.fields(part):
                found[f"{section.name}.{key.name}"] = getattr(part, key.name)
    return found


def merged(running: Config, found: Config, changes: Changes) -> Config:
    """The running tree with the values of ``found`` for the keys that take effect."""
    parts: dict[str, Any] = {}
    for key in changes.now:
        section, _, name = key.partition(".")
        before = parts.get(section, getattr(running, section))
        parts[section] = dataclasses.replace(before, **{name: getattr(getattr(found, section), name)})
    return dataclasses.replace(running, **parts)
