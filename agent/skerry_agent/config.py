"""Reads the agent's configuration: one frozen tree (``configtree``), read once from a TOML file and the environment.

Every key has a default but ``state_dir``. ``SKERRY_AGENT_<SECTION>_<KEY>`` overrides (``SKERRY_AGENT_STATE_DIR`` for the one key
without a section). All faults are reported together; an unknown key is a fault. What enrolment learnt fills what the file leaves out
(``identity``). No secrets stand in here: keys are files under ``identity/``.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
from skerry_contract import ids, misfit
from skerry_contract.errors import ContractError
from skerry_contract.manifest import Runtime

from skerry_agent.configtree import Config
from skerry_agent.core import bounds
from skerry_agent.errors import BadConfig

__all__ = ["Config", "as_toml_keys", "build", "load"]

ENVIRONMENT_PREFIX = "SKERRY_AGENT_"
MOST_PATH_BYTES = 107
"""``sun_path`` of unix(7), less its terminating zero."""
MOST_THREADS = 256


_SECTIONS = (
    "server",
    "repository",
    "mqtt",
    "network",
    "serving",
    "access",
    "apps",
    "labels",
    "limits",
    "pool",
    "device",
    "runtime",
    "timing",
    "updates",
    "telemetry",
    "encryption",
    "log",
)
LEAST_OUTBOX_MB = 8.0
"""The log of the store alone may take 4 MB."""
LONGEST_COMMIT_S = 60.0
MOST_PREDICTIONS = 1 << 24
"""Of one key, 300 MB of disk."""
MOST_UPLOAD_KIB = 2048
"""Half of what the server takes of a batch: records have more to them than bodies."""


_PORT = "wanted a port from 0 to 65535, got {!r}"
_PORT_OR_NONE = 'wanted a port from 0 to 65535, or "none", got {!r}'


def load(path: Path, environment: Mapping[str, str]) -> Config:
    """Reads the file and the environment.

    Raises:
        BadConfig: with every fault found.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig([f"{path}: cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig([f"{path}: no TOML: {error}"]) from None
    return build(tree, environment, what=str(path))


def build(tree: Mapping[str, Any], environment: Mapping[str, str], *, what: str = "configuration") -> Config:
    """Checks a tree of builtins. Raises ``BadConfig`` with every fault."""
    faults: list[str] = []
    types = get_type_hints(Config)
    values: dict[str, Any] = {}
    for name in tree:
        if name != "state_dir" and name not in _SECTIONS:
            faults.append(f"{what}: unknown key {name!r}; wanted state_dir or one of {', '.join(_SECTIONS)}")
    for name in _SECTIONS:
        given = tree.get(name, {})
        if not isinstance(given, dict):
            faults.append(f"{what}: {name}: wanted a table, got {type(given).__name__}")
            given = {}
        values[name] = _section(name, types[name], given, environment, what, faults)
    state_dir = environment.get(f"{ENVIRONMENT_PREFIX}STATE_DIR", tree.get("state_dir"))
    if not isinstance(state_dir, str) or not state_dir:
        faults.append(f"{what}: state_dir: wanted the path of a folder, got {state_dir!r}")
    elif not Path(state_dir).is_absolute():
        faults.append(f"{what}: state_dir: wanted an absolute path, got {state_dir!r}")
    runtime = values["runtime"]
    loose = sorted(set(runtime.onnx_provider_options) - set(runtime.onnx_providers))
    if loose:
        faults.append(f"{what}: runtime.onnx_provider_options: {', '.join(loose)} is not one of runtime.onnx_providers")
    serving = values["serving"]
    if serving.port == "none" and not serving.socket:
        faults.append(f'{what}: serving.port: "none" wants a serving.socket, or nothing could ask this agent')
    if faults:
        raise BadConfig(faults)
    return Config(state_dir=Path(str(state_dir)), **values)


def _section(
    section: str, kind: Any, given: Mapping[str, Any], environment: Mapping[str, str], what: str, faults: list[str]
) -> Any:
    hints = get_type_hints(kind)
    for name in given:
        if name not in hints:
            faults.append(f"{what}: unknown key {section}.{name}; wanted one of {', '.join(sorted(hints))}")
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        variable = f"{ENVIRONMENT_PREFIX}{section.upper()}_{name.upper()}"
        where = f"{what}: {section}.{name}"
        if variable in environment:
            where = variable
            raw: Any = environment[variable]
            if hint == tuple[str, ...]:
                raw = [part for part in raw.split(",") if part]
            strict = False
        elif name in given:
            raw, strict = given[name], True
        else:
            continue
        try:
            value = msgspec.convert(raw, hint, strict=strict)
        except msgspec.ValidationError as error:
            place, words = misfit.words(error, hint, raw)
            if name == "port":
                place, words = "", (_PORT if hint is int else _PORT_OR_NONE).format(raw)
            faults.append(f"{where}{'.' if place and not place.startswith('[') else ''}{place}: {words}")
            continue
        fault = _fault(f"{section}.{name}", value)
        if fault:
            faults.append(f"{where}: {fault}")
        values[name] = value
    return kind(**values)


def _is_model(name: str) -> bool:
    try:
        ids.model_name(name)
    except ContractError:
        return False
    return True


def _fault(key: str, value: Any) -> str | None:
    # What can say why comes first.
    return _own_fault(key, value) or bounds.fault(key, value)


def _own_fault(key: str, value: Any) -> str | None:
    if key == "limits.outbox_mb" and value < LEAST_OUTBOX_MB:
        return f"wanted {LEAST_OUTBOX_MB:g} or more: the log of the store may take half of it, got {value}"
    if key == "timing.commit_s" and value > LONGEST_COMMIT_S:
        return f"wanted at most {LONGEST_COMMIT_S:g}: so much more than a window's counts may be lost when power fails, got {value}"
    if key == "labels.predictions" and value > MOST_PREDICTIONS:
        return f"wanted at most {MOST_PREDICTIONS}: each takes 18 bytes of disk, per window key, got {value}"
    if key == "limits.upload_kib" and value > MOST_UPLOAD_KIB:
        return f"wanted at most {MOST_UPLOAD_KIB}: the server takes no larger batch, got {value}"
    if key.endswith(".port") and value != "none" and not 0 <= value <= 65535:
        return f"wanted a port from 0 to 65535, got {value}"
    if key == "encryption.key" and value != "file" and not value.startswith("pkcs11:"):
        return f'wanted "file" or a pkcs11: URI, got {value!r}'
    if key in ("telemetry.memory_dir", "encryption.memory_dir") and not value.startswith("/"):
        return f"wanted an absolute path, got {value!r}"
    if key.endswith(".url") and value and not value.startswith("https://"):
        return f"wanted an https:// address, got {value!r}"
    if key == "serving.host" and value not in ("127.0.0.1", "::1", "localhost"):
        return f"wanted a loopback address: this endpoint has no TLS, got {value!r}"
    if key == "device.runtimes":
        known = get_args(Runtime)
        wrong = [name for name in value if name not in known]
        if wrong:
            return f"wanted some of {', '.join(known)}, got {', '.join(map(repr, wrong))}"
        if len(set(value)) != len(value):
            return f"wanted each runtime once, got {', '.join(value)}"
    if key == "pool.on_demand":
        wrong = [name for name in value if not _is_model(name)]
        if wrong:
            return f"wanted names of models, got {', '.join(map(repr, wrong))}"
    if key == "runtime.threads" and value > MOST_THREADS:
        return f"wanted at most {MOST_THREADS}, got {value}"
    if key == "runtime.onnx_providers" and len(set(value)) != len(value):
        return f"wanted each provider once, got {', '.join(value)}"
    if key.endswith(".socket") and value and not (value.startswith("/") and len(value.encode()) <= MOST_PATH_BYTES):
        return f"wanted an absolute path of at most {MOST_PATH_BYTES} bytes, got {value!r}"
    if key.endswith(".socket_mode") and re.fullmatch("0?[0-7]{3}", value) is None:
        return f"wanted octal digits as 0660, got {value!r}"
    if key == "telemetry.otlp_endpoint" and value and not value.startswith(("http://", "https://")):
        return f"wanted an http:// or https:// address, got {value!r}"
    if key == "telemetry.trace_share" and not 0 <= value <= 1:
        return f"wanted a share from 0 to 1, got {value}"
    if key == "log.level" and value not in ("debug", "info", "warning", "error"):
        return f"wanted debug, info, warning or error, got {value!r}"
    return None


def as_toml_keys() -> tuple[str, ...]:
    """Every key that the file may hold, dotted, sorted: for the reference page and its test."""
    hints = get_type_hints(Config)
    keys = [f"{section}.{f.name}" for section in _SECTIONS for f in dataclasses.fields(hints[section])]
    return ("state_dir", *sorted(keys))
