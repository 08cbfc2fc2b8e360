"""The floors: the lowest version of each model that may be activated, signed by the approvers beside the bundles.

A floor is about activation only: it stops no bundle that is serving. A model without a floor may run any version.
"""

from __future__ import annotations

from collections.abc import Mapping

from skerry_contract import canonical, ids
from skerry_contract.errors import Malformed, UnsupportedVersion

SCHEMA = 1
MAX_BYTES = 1 << 20


def encode(floors: Mapping[str, str]) -> bytes:
    """The canonical bytes of ``floors.json``. Raises ``Malformed`` for a name or version out of the grammar.

    >>> encode({})
    b'{"floors":{},"schema":1}'
    """
    data = canonical.encode({"floors": dict(floors), "schema": SCHEMA})
    parse(data)
    return data


def parse(data: bytes) -> dict[str, str]:
    """Reads ``floors.json``: model -> lowest version that may be activated.

    Raises:
        Malformed: not canonical, no map, or a name or version out of the grammar.
        UnsupportedVersion: written by a newer tool.
    """
    value = canonical.decode(data, what="floors", max_bytes=MAX_BYTES)
    schema, floors = value.get("schema"), value.get("floors")
    if isinstance(schema, int) and schema > SCHEMA:
        raise UnsupportedVersion("floors", schema, SCHEMA)
    if schema != SCHEMA or not isinstance(floors, dict):
        raise Malformed("floors", f"wanted schema {SCHEMA} and a map of floors")
    for model, version in floors.items():
        ids.model_name(model)
        ids.version_key(version)
    return {str(model): str(version) for model, version in floors.items()}


def allows(floors: Mapping[str, str], model: str, version: str) -> bool:
    """Whether a version of a model may be activated.

    >>> allows({"gas": "1.2.0"}, "gas", "1.10.0"), allows({"gas": "1.2.0"}, "gas", "1.2.0-rc.1"), allows({}, "gas", "0.1.0")
    (True, False, True)
    """
    floor = floors.get(model)
    return floor is None or ids.version_key(version) >= ids.version_key(floor)
