"""What is served: slots on disk, a runtime that builds an interpreter, a worker that answers."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from skerry_agent import facts, memory_folder, opening
from skerry_agent.doctor.finding import NET_S, Finding, Patient
from skerry_agent.slots import Slots, read_pointers

_NO_FAULT = frozenset({"withdrawn", "yielded", "interrupted", "reverted_by_operator"})
_INTERPRETER_S = 120.0
_INTERPRETER = """
import sys
from skerry_runtime import proof
from skerry_runtime.bundle import open_bundle
from skerry_runtime.runner import load
path, digest, variant = sys.argv[1:]
found = proof.prove(load(open_bundle(path, digest=digest, variants=[variant]), variant))
print(found.detail or f"{found.passed} of {found.cases} golden cases passed")
sys.exit(0 if found.ok else 1)
"""


def check_slots(patient: Patient) -> Iterator[Finding]:
    """Whether every bundle that a pointer names is whole on disk."""
    root = patient.config.state_dir / "slots"
    named = read_pointers(patient.config.state_dir / "slots")
    if not named:
        yield Finding(check="slots", verdict="ok", detail="no bundle yet")
        return
    # Reads only: the folder is there, and its pointer file was just read.
    slots = Slots(root, opening.folder_of(patient.config))
    wrong: list[str] = []
    right: list[str] = []
    for model, pointers in sorted(named.items()):
        for role in ("confirmed", "active", "previous"):
            slot = getattr(pointers, role)
            if slot is not None:
                said = f"{role} {model} {slot.version} ({slot.digest[:12]})"
                (right if slots.whole(slot.digest, slot.variant) else wrong).append(said)
    if wrong:
        vital = any(not said.startswith("previous") for said in wrong)
        yield Finding(
            check="slots",
            verdict="fail" if vital else "warn",
            detail=f"not whole on disk: {', '.join(wrong)}",
            advice="skerry-agent sync --pardon fetches what the group wants again; look at the disk's health",
        )
    else:
        yield Finding(check="slots", verdict="ok", detail=", ".join(right))


def check_worker(patient: Patient) -> Iterator[Finding]:
    """Whether the worker answers, on each of its addresses."""
    status = patient.status
    if status is None:
        return
    if not status["running"]:
        named = read_pointers(patient.config.state_dir / "slots")
        wanted = [
            f"{model} {slot.version}"
            for model, p in sorted(named.items())
            if (slot := p.active or p.confirmed) is not None
        ]
        yield Finding(
            check="worker",
            verdict="fail" if wanted else "warn",
            detail=f"nothing is served, and {', '.join(wanted)} should be" if wanted else "nothing is served yet",
            advice="skerry-agent status says what the last sync and update came to; the agent's log why no worker starts",
        )
        return
    for model, running in sorted(status["running"].items()):
        if running["state"] == "stopped":
            yield Finding(
                check="worker",
                verdict="fail",
                detail=f"{model} {running['version']} has no worker now",
                advice="the agent starts it again after growing pauses; its log says why it dies",
            )
    for model, times in sorted(status["worker"]["suspects"].items()):
        yield Finding(
            check="worker",
            verdict="warn",
            detail=f"{model} was in work when its worker died, {times} times of late",
            advice="after five times within ten minutes its previous bundle comes back, or it goes on in a worker of its own",
        )
    for one in status["workers"]:
        kind = f"{one['cell']}'s own worker" if one["cell"] else "the shared worker"
        most = f", {one['own_mb']:.0f} MB of its own of at most {one['most_mb']:.0f}" if one["most_mb"] else ""
        yield Finding(check="worker", verdict="ok", detail=f"{kind}: {', '.join(one['models']) or 'no model'}{most}")
    serving = status["serving"]
    if "port" in serving:
        tcp = http.client.HTTPConnection(serving["host"], serving["port"], timeout=NET_S)
        yield _ready(tcp, f"http://{serving['host']}:{serving['port']}")
    if serving.get("socket"):
        local = http.client.HTTPConnection("localhost", timeout=NET_S)
        local.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        local.sock.settimeout(NET_S)
        try:
            local.sock.connect(serving["socket"])
        except OSError as error:
            yield _not_ready(serving["socket"], str(error))
            return
        yield _ready(local, serving["socket"])


def _ready(connection: http.client.HTTPConnection, where: str) -> Finding:
    begin = time.monotonic()
    try:
        connection.request("GET", "/v2/health/ready")
        answer = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return _not_ready(where, str(error) or type(error).__name__)
    finally:
        connection.close()
    if answer != 200:
        return _not_ready(where, f"status {answer}")
    return Finding(check="worker", verdict="ok", detail=f"{where} ready in {(time.monotonic() - begin) * 1e3:.1f} ms")


def _not_ready(where: str, why: str) -> Finding:
    return Finding(
        check="worker",
        verdict="fail",
        detail=f"{where}: {why}",
        advice="the agent starts a worker that died again by itself; its log says why it dies",
    )


def check_engines(patient: Patient) -> Iterator[Finding]:
    """Whether models run on what the configuration asks for."""
    engines = patient.status.get("engines", {}) if patient.status is not None else {}
    for model, engine in engines.items():
        where = ", ".join(engine["runs_on"])
        if engine["fallback"]:
            yield Finding(
                check="engine",
                verdict="warn",
                detail=f"{model} runs on {where}: {engine['fallback']}",
                advice="correct [runtime] in the configuration, or install what it names; the CPU answers meanwhile",
            )
        elif engine["runs_on"] != ["cpu"]:
            yield Finding(check="engine", verdict="ok", detail=f"{model} runs on {where}")


def check_update(patient: Patient) -> Iterator[Finding]:
    """What the last update came to."""
    update = patient.status["update"] if patient.status is not None else None
    if update is None:
        return
    said = f"{update['model']} {update['version']}: {update['state'].replace('_', ' ')}"
    if not update["code"] or update["code"] in _NO_FAULT:
        yield Finding(check="update", verdict="ok", detail=said)
        return
    yield Finding(
        check="update",
        verdict="warn",
        detail=f"{said}, {update['code']}" + (f": {update['detail']}" if update["detail"] else ""),
        advice="docs/reference/reason-codes.md has the code; skerry-agent sync --pardon tries a bundle again that is given up",
    )


def check_runtime(patient: Patient) -> Iterator[Finding]:
    """Whether a runtime builds and proves what should serve, in a child process."""
    installed = facts.runtimes(patient.config)
    if not installed:
        yield Finding(
            check="runtime",
            verdict="fail",
            detail="no model runtime that the configuration allows is installed",
            advice="install skerry-agent with one of the extras onnx, litert, tflite, or change device.runtimes",
        )
        return
    left_out = set(installed) - set(patient.status["runtimes"] if patient.status is not None else installed)
    for name in sorted(left_out):
        yield Finding(
            check="runtime",
            verdict="fail",
            detail=f"{name} {installed[name]} is installed, and the agent left it out: no worker could load a model on it",
            advice="the agent's log says why; repair the runtime, then restart the agent or wait until it tries again by itself",
        )
    said = ", ".join(f"{name} {version}" for name, version in sorted(installed.items()) if name not in left_out)
    named = read_pointers(patient.config.state_dir / "slots")
    chosen = [(name, p.active or p.confirmed) for name, p in sorted(named.items())]
    if said and not any(slot for _, slot in chosen):
        yield Finding(check="runtime", verdict="ok", detail=f"{said}; no bundle here to build an interpreter from")
    if not chosen:
        # A folder would be made; who looks leaves a device as it is.
        return
    slots = Slots(patient.config.state_dir / "slots", opening.folder_of(patient.config))
    for name, slot in chosen:
        if slot is None:
            continue
        if slots.is_closed(slot.digest, slot.variant):
            yield Finding(
                check="runtime",
                verdict="warn",
                detail=f"{name} {slot.version} is encrypted, and not open in memory: nothing is built from it{_why_not(patient)}",
                advice="the agent opens it when it starts; its log says why it could not",
            )
            continue
        path = slots.load_path(slot.digest)
        yield _built(f"{name} {slot.version}", (str(path), slot.digest, slot.variant))


def _why_not(patient: Patient) -> str:
    """What the folder in memory has to do with it; empty where that is nothing."""
    folder = opening.folder_of(patient.config)
    stranger = memory_folder.stranger(folder) if folder is not None else ""
    why = memory_folder.unfit(Path(patient.config.encryption.memory_dir)) or (
        stranger and f"{stranger} has the folder's name; the agent makes another"
    )
    return f" ({why})" if why else ""


_OF_THE_FILES = ("hash_mismatch", "size_mismatch", "malformed_manifest", "model_damaged")


def _built(what: str, arguments: tuple[str, ...]) -> Finding:
    try:
        child = subprocess.run(  # noqa: PLW1510 - its status is looked at
            [sys.executable, "-P", "-c", _INTERPRETER, *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_INTERPRETER_S,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            check="runtime",
            verdict="fail",
            detail=f"{what}: no answer within {_INTERPRETER_S:g} s",
            advice="look at the device's load and memory",
        )
    words = (child.stdout if child.returncode in (0, 1) and child.stdout else child.stderr).decode(errors="replace")
    last = (words.strip().splitlines() or [f"ended with {child.returncode}"])[-1]
    if child.returncode == 0:
        return Finding(check="runtime", verdict="ok", detail=f"{what}: {last}")
    how = f"died of signal {-child.returncode}: {last}" if child.returncode < 0 else last
    if any(code in last for code in _OF_THE_FILES):
        # Not of the runtime: what lies here is not what was signed.
        advice = "skerry-agent sync: the agent fetches it again; when it comes back, look at the disk or card"
        return Finding(check="runtime", verdict="fail", detail=f"{what}: {how}", advice=advice)
    return Finding(
        check="runtime",
        verdict="fail",
        detail=f"{what}: {how}",
        advice="skerry-agent revert, and reinstall the runtime if another bundle fails too",
    )
