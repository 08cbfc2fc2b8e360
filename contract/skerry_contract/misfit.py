"""Says of a value that does not fit its type where it stands, what was wanted and what came, in words for a person.

msgspec's own message names neither the choices of an enumeration nor the value that was given. What is said here follows from the type
itself, so that it cannot go stale. Loaded when something is wrong, and not before.
"""

from __future__ import annotations

import re
from typing import Any

from msgspec import inspect

_MOST = 80
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_WORDS: dict[type, str] = {
    inspect.BoolType: "true or false", inspect.BytesType: "bytes in base64", inspect.NoneType: "null", inspect.AnyType: "any value",
}  # fmt: skip


def words(error: Exception, kind: Any, given: Any) -> tuple[str, str]:
    """(place below the value, such as ``limits.mb`` or ``files[2].size``, empty for itself; "wanted ..., got ...").

    Args:
        error: what ``msgspec.convert(given, kind)`` raised.

    >>> import msgspec
    >>> from typing import Literal
    >>> try:
    ...     msgspec.convert({"a": ["keep"]}, dict[str, list[Literal["drop", "hash"]]])
    ... except msgspec.ValidationError as error:
    ...     words(error, dict[str, list[Literal["drop", "hash"]]], {"a": ["keep"]})
    ('a[0]', "wanted one of drop, hash, got 'keep'")
    """
    said, at, path = str(error).partition(" - at `$")
    if not at:
        said, at_key, path = str(error).partition(" - at `key` in `$")
    else:
        at_key = ""
    node, value, where = inspect.type_info(kind), given, ""
    for name, index in _STEP.findall(path.removesuffix("`")):
        node, value, step = _below(node, value, name or index)
        where += step if step.startswith("[") else f".{step}"
    where = where.removeprefix(".")
    if at_key and isinstance(node, inspect.DictType):
        return where, f"wanted keys that are {wanted(node.key_type)}, got {', '.join(map(_shown, value))}"
    unknown = _UNKNOWN_FIELD.fullmatch(said)
    if unknown is not None and isinstance(node, inspect.StructType):
        return where, f"wanted no field but {', '.join(f.encode_name for f in node.fields)}, got {_shown(unknown[1])}"
    if said.startswith("Object missing"):
        return where, f"wanted {said.removeprefix('Object missing required field ')}, got no such field"
    return where, f"wanted {wanted(node)}, got {_shown(value)}"


def wanted(node: inspect.Type) -> str:
    """What fits a type."""
    if type(node) in _WORDS:
        return _WORDS[type(node)]
    match node:
        case inspect.LiteralType(values=values):
            return f"one of {', '.join(map(str, values))}" if len(values) > 1 else str(values[0])
        case inspect.EnumType(cls=cls):
            return f"one of {', '.join(str(one.value) for one in cls)}"
        case inspect.IntType() | inspect.FloatType():
            return ("a whole number" if isinstance(node, inspect.IntType) else "a number") + _range(node)
        case inspect.StrType(pattern=pattern, min_length=least, max_length=most):
            return "text" + (f" that matches {pattern}" if pattern else "") + _length(least, most, "characters")
        case inspect.UnionType(types=types):
            return " or ".join(dict.fromkeys(wanted(one) for one in types))
        case inspect.DictType(value_type=value, min_length=least, max_length=most):
            return f"a table, each value {wanted(value)}" + _length(least, most, "entries")
        case inspect.StructType(fields=fields):
            return f"a table of {', '.join(f.encode_name for f in fields)}"
        case inspect.TupleType(item_types=items):
            return f"a list of {len(items)}: {', '.join(map(wanted, items))}"
        case inspect.Metadata(type=inner):
            return wanted(inner)
        case _:
            item = getattr(node, "item_type", None)
            if item is None:
                return "another type of value"
            least, most = getattr(node, "min_length", None), getattr(node, "max_length", None)
            return f"a list, each of it {wanted(item)}" + _length(least, most, "items")


def _below(node: inspect.Type, value: Any, key: str) -> tuple[inspect.Type, Any, str]:
    """Type and value one step further, and the step in words. ``...`` stands for any key of a table: the first that does not fit."""
    while isinstance(node, inspect.Metadata):
        node = node.type
    if isinstance(node, inspect.UnionType):
        shaped = [
            one
            for one in node.types
            if isinstance(one, inspect.StructType | inspect.DictType) or hasattr(one, "item_type")
        ]
        node = next((one for one in shaped if _has(one, key)), shaped[0] if shaped else node)
    if isinstance(node, inspect.StructType):
        found = next((f.type for f in node.fields if f.encode_name == key), inspect.AnyType())
        return found, value.get(key) if isinstance(value, dict) else value, key
    if isinstance(node, inspect.DictType):
        for name, one in value.items() if isinstance(value, dict) else ():
            if key in ("...", name) and not _fits(one, node.value_type):
                return node.value_type, one, str(name)
        return node.value_type, value, key
    if isinstance(node, inspect.TupleType) and key.isdigit() and int(key) < len(node.item_types):
        item: inspect.Type = node.item_types[int(key)]
    else:
        item = getattr(node, "item_type", inspect.AnyType())
    inside = key.isdigit() and isinstance(value, list | tuple) and int(key) < len(value)
    return item, value[int(key)] if inside else value, f"[{key}]"


def _has(node: inspect.Type, key: str) -> bool:
    if isinstance(node, inspect.StructType):
        return any(f.encode_name == key for f in node.fields)
    return isinstance(node, inspect.DictType) == (key == "...")


def _fits(value: Any, node: inspect.Type) -> bool:
    """Whether a value could be of a type, as far as that is told without converting it."""
    match node:
        case inspect.LiteralType(values=values):
            return value in values
        case inspect.StrType():
            return isinstance(value, str)
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.IntType() | inspect.FloatType():
            whole = isinstance(node, inspect.IntType)
            number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            return number and (node.ge is None or value >= node.ge) and (node.le is None or value <= node.le)
        case inspect.UnionType(types=types):
            return any(_fits(value, one) for one in types)
        case inspect.DictType(value_type=inner):
            return isinstance(value, dict) and all(_fits(one, inner) for one in value.values())
        case inspect.StructType(fields=fields):
            inside = isinstance(value, dict)
            return inside and all(_fits(value[f.encode_name], f.type) for f in fields if f.encode_name in value)
        case _:
            item = getattr(node, "item_type", None)
            return item is None or (isinstance(value, list | tuple) and all(_fits(one, item) for one in value))


def _range(node: inspect.IntType | inspect.FloatType) -> str:
    parts = []
    if node.gt is not None:
        parts.append(f"more than {node.gt}")
    if node.ge is not None:
        parts.append(f"at least {node.ge}")
    if node.lt is not None:
        parts.append(f"less than {node.lt}")
    if node.le is not None:
        parts.append(f"at most {node.le}")
    if node.ge is not None and node.le is not None and len(parts) == 2:
        return f" from {node.ge} to {node.le}"
    return f", {' and '.join(parts)}" if parts else ""


def _length(least: int | None, most: int | None, unit: str) -> str:
    if least and most is not None:
        return f", {least} to {most} {unit}"
    if least:
        return f", at least {least} {unit}"
    return f", at most {most} {unit}" if most is not None else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        text = str(value).lower()
    elif value is None:
        text = "null"
    elif isinstance(value, dict):
        text = "a table"
    elif isinstance(value, list | tuple):
        text = "a list"
    else:
        text = repr(value)
    return text if len(text) <= _MOST else text[: _MOST - 3] + "..."
