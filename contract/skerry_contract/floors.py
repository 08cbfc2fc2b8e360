"""The floors: the lowest version of each model that may be activated, signed by the approvers beside the bundles.

A floor is about activation: it stops no bundle that is serving. Only a forced one does, for a version that must not answer any
more (``forced``, never above the floor of the model). A model without a floor may run any version. An agent that knows no forced
floors keeps to the floors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skerry_contract import canonical, ids
from skerry_contract.errors import Malformed, UnsupportedVersion

SCHEMA = 1
MAX_BYTES = 1 << 20


def encode(floors: Mapping[str, str], forced: Mapping[str, str] | None = None) -> bytes:
    """The canonical bytes of ``floors.json``.

    Args:
        floors: model -> lowest version that may be activated.
        forced: model -> lowest version that may go on serving; left out when there is none.

    Raises:
        Malformed: a name or version out of the grammar, or a forced floor above the floor of its model.

    >>> encode({}), encode({"gas": "2.0.0"}, {"gas": "1.2.0"})
    (b'{"floors":{},"schema":1}', b'{"floors":{"gas":"2.0.0"},"forced":{"gas":"1.2.0"},"schema":1}')
    """
    value: dict[str, Any] = {"floors": dict(floors), "schema": SCHEMA}
    if forced:
        value["forced"] = dict(forced)
    data = canonical.encode(value)
    parse(data)
    return data


def parse(data: bytes) -> dict[str, str]:
    """Reads ``floors.json``: model -> lowest version that may be activated.

    Raises:
        Malformed: not canonical, no map, a name or version out of the grammar, or a forced floor above its floor.
        UnsupportedVersion: written by a newer tool.
    """
    return _read(data)[0]


def parse_forced(data: bytes) -> dict[str, str]:
    """Reads the forced floors of ``floors.json``: model -> lowest version that may go on serving. Raises as ``parse``.

    >>> parse_forced(b'{"floors":{"gas":"2.0.0"},"forced":{"gas":"1.2.0"},"schema":1}'), parse_forced(encode({}))
    ({'gas': '1.2.0'}, {})
    """
    return _read(data)[1]


def _read(data: bytes) -> tuple[dict[str, str], dict[str, str]]:
    value = canonical.decode(data, what="floors", max_bytes=MAX_BYTES)
    schema, floors, forced = value.get("schema"), value.get("floors"), value.get("forced", {})
    if isinstance(schema, int) and schema > SCHEMA:
        raise UnsupportedVersion("floors", schema, SCHEMA)
    if schema != SCHEMA or not isinstance(floors, dict) or not isinstance(forced, dict):
        raise Malformed("floors", f"wanted schema {SCHEMA}, a map of floors and perhaps one of forced floors")
    for versions in (floors, forced):
        for model, version in versions.items():
            ids.model_name(model)
            ids.version_key(version)
    for model, version in forced.items():
        if model not in floors or ids.version_key(version) > ids.version_key(floors[model]):
            wanted = f"wanted at most the floor of the model, {floors.get(model, 'none')}, got {version}"
            raise Malformed("floors", wanted, where=f"forced.{model}")
    return {str(k): str(v) for k, v in floors.items()}, {str(k): str(v) for k, v in forced.items()}


def allows(floors: Mapping[str, str], model: str, version: str) -> bool:
    """Whether a version of a model may be activated.

    >>> allows({"gas": "1.2.0"}, "gas", "1.10.0"), allows({"gas": "1.2.0"}, "gas", "1.2.0-rc.1"), allows({}, "gas", "0.1.0")
    (True, False, True)
    """
    floor = floors.get(model)
    return floor is None or ids.version_key(version) >= ids.version_key(floor)
