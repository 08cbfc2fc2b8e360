"""What signed metadata told this device once and for all: floors, forced floors, and the lower bound of time.

The store has it, and a small file beside it has it too: a store that a power cut damaged is set aside, and what was forced out must not
answer again by that, nor a device that knows no time believe old metadata. Floors only rise, so the higher of the two counts. A
bound counts while root names a key that signed it; the store's is the later word, unless it has none or the same key said more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skerry_contract import ids
from skerry_contract.errors import ContractError

from skerry_agent import durable
from skerry_agent.clock import Clock
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.store import Store

log = logging.getLogger(__name__)

FILE = "remembered.json"
_MOST_BYTES = 4 << 20
_BOUND_EVERY_S = 3600.0
"""The file's bound may lag behind the store's by so much: it is there for a store that is gone."""


class Remembered:
    """See the module.

    Args:
        folder: the agent's, where the file lies.

    Attributes:
        floors, forced: model -> version.
        bound_keys: ids of the keys that signed the lower bound of time; the bound itself is the clock's.
    """

    def __init__(self, store: Store, clock: Clock, folder: Path) -> None:
        self._store = store
        self._clock = clock
        self._path = folder / FILE
        self._kept = _read(self._path)
        self.floors = higher(store.get("floors", {}), self._kept["floors"])
        self.forced = higher(store.get("forced", {}), self._kept["forced"])
        bound_s, keys = float(store.get("lower_bound_s", 0.0)), tuple(store.get("lower_bound_keys", ()))
        kept_s, kept_keys = float(self._kept["lower_bound_s"]), tuple(self._kept["lower_bound_keys"])
        if kept_s > bound_s and (bound_s == 0.0 or set(keys) & set(kept_keys)):
            bound_s, keys = kept_s, kept_keys
        self.bound_keys = keys
        clock.set_lower_bound(bound_s)
        try:
            self._store_all()
        except Degraded as error:
            # A full disk, say: what is known here counts all the same.
            log.warning("not stored", extra=kv(code=error.code, detail=error.detail))

    def take(
        self,
        *,
        signed_at_s: float,
        signed_by: tuple[str, ...],
        named: tuple[str, ...],
        floors: Mapping[str, str],
        forced: Mapping[str, str],
    ) -> None:
        """Takes what a sync verified, into the store.

        Args:
            signed_at_s: when the timestamp was signed; signed_by: ids of the keys whose signatures on it hold.
            named: ids of the keys that root names for it.

        Raises:
            Degraded: the store cannot be written.
        """
        self.floors, self.forced = higher(self.floors, floors), higher(self.forced, forced)
        # What a key said that root names no more may have been a thief's: it is void, not merely old.
        void = bool(self.bound_keys) and bool(named) and not set(self.bound_keys) & set(named)
        if signed_at_s > 0 and (void or signed_at_s > self._clock.lower_bound_s):
            self._clock.set_lower_bound(signed_at_s)
            self.bound_keys = signed_by
        self._store_all()

    def _values(self) -> dict[str, Any]:
        return {
            "floors": self.floors,
            "forced": self.forced,
            "lower_bound_s": self._clock.lower_bound_s,
            "lower_bound_keys": list(self.bound_keys),
        }

    def _store_all(self) -> None:
        with self._store.transaction():
            for key, value in self._values().items():
                if value and value != self._store.get(key):
                    self._store.put(key, value)

    def keep(self) -> None:
        """Writes the file when the store has what it has not."""
        values = self._values()
        near = 0 <= values["lower_bound_s"] - float(self._kept["lower_bound_s"]) < _BOUND_EVERY_S
        if near and values == {**self._kept, "lower_bound_s": values["lower_bound_s"]}:
            return
        try:
            durable.write(self._path, json.dumps({"schema": 1, **values}).encode())
        except OSError as error:
            # The store has it; the next sync tries again.
            log.warning("not kept beside the store", extra=kv(file=str(self._path), detail=error.strerror))
            return
        self._kept = values


def higher(known: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """Floors only rise, whatever a later catalog says.

    >>> higher({"gas": "1.10.0"}, {"gas": "1.9.0", "oil": "2.0.0"})
    {'gas': '1.10.0', 'oil': '2.0.0'}
    """
    result = dict(known)
    for model, version in found.items():
        if model not in result or ids.version_key(version) > ids.version_key(result[model]):
            result[str(model)] = str(version)
    return result


def _read(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none, or where only a hand or the medium can have changed it."""
    nothing: dict[str, Any] = {"floors": {}, "forced": {}, "lower_bound_s": 0.0, "lower_bound_keys": []}
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_MOST_BYTES))
        values = {key: found[key] for key in nothing}
        for floors in (values["floors"], values["forced"]):
            higher({}, floors)
            for version in floors.values():
                ids.version_key(version)
        if not 0 <= float(values["lower_bound_s"]) < 1 << 40 or not all(
            isinstance(key, str) for key in values["lower_bound_keys"]
        ):
            raise ValueError("lower_bound")
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ContractError) as error:
        log.warning("what was kept beside the store cannot be read", extra=kv(file=str(path), detail=str(error)))
        return nothing
    return values
