"""What validation looks at, in the process that it may kill; see ``validation`` for the one that survives.

Checked, in this order: files and digests; the reference against features and labels; then for each variant: the graph (its
declared precision, files that it refers to), load, names and widths through all transforms, golden cases one by one and as
one batch, and what was measured against ``needs``. A variant whose runtime or architecture is not here is ``skipped``.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from skerry_contract import manifest as mf

from skerry_runtime import child, engines, precision, precision_tflite, proof, runner
from skerry_runtime.bundle import Bundle, open_bundle
from skerry_runtime.errors import BadInput, BundleFault, Rejected
from skerry_runtime.validation import Line, Progress, ValidationResult, VariantResult

_TIMED_RUNS, _WARM_RUNS = 100, 10
_MOST_TRIED_STREAMS = 32
Report = Callable[[Line], None]


def main(arguments: Sequence[str]) -> int:
    """The child: limits itself, examines, writes lines. 0 when valid, 1 when not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m skerry_runtime.validation", description="Validates a bundle.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    parser.add_argument("--memory-mb", type=int, default=4000)
    parser.add_argument("--digest", default=None)
    options = parser.parse_args(arguments)
    child.limit_self(memory_mb=options.memory_mb, timeout_s=options.timeout_s)
    descriptor = child.private_stdout()

    def report(line: Line) -> None:
        data = msgspec.json.encode(line) + b"\n"
        while data:
            data = data[os.write(descriptor, data) :]

    try:
        result = examine(options.folder, digest=options.digest, report=report)
    except MemoryError:
        result = ValidationResult(ok=False, code="out_of_memory", detail=f"more than {options.memory_mb} MB wanted")
    report(Line(result=result))
    return 0 if result.ok else 1


def examine(folder: Path, *, digest: str | None, report: Report) -> ValidationResult:
    """Does all checks in this process.

    Args:
        folder: the bundle's.
        digest: the identity it must have; None takes what is there.
        report: told where it has got to, before each step.
    """
    machine = {"arch": platform.machine(), **engines.available()}
    report(Line(progress=Progress(stage="opening the bundle")))
    try:
        bundle = open_bundle(folder, digest=digest)
    except BundleFault as fault:
        return ValidationResult(ok=False, code=fault.code, detail=fault.detail, machine=machine)
    manifest = bundle.manifest
    identity = {"digest": str(bundle.digest), "model": str(manifest.model), "version": manifest.version}

    def at(stage: str) -> None:
        report(Line(progress=Progress(stage=stage, **identity)))

    def verdict(code: str, detail: str, variants: tuple[VariantResult, ...] = ()) -> ValidationResult:
        return ValidationResult(
            ok=not code,
            code=code,
            detail=detail,
            digest=identity["digest"],
            model=identity["model"],
            version=identity["version"],
            variants=variants,
            machine=machine,
        )

    at("reading the reference")
    try:
        check_reference(manifest)
    except Rejected as fault:
        return verdict(fault.code, fault.detail)
    results = tuple(_examine_variant(bundle, variant, machine, at) for variant in manifest.variants)
    for found in results:
        if found.status == "failed":
            return verdict(found.code, f"variant {found.id}: {found.detail}", results)
    if all(found.status == "skipped" for found in results):
        return verdict(
            "runtime_missing", "; ".join(f"variant {found.id}: {found.detail}" for found in results), results
        )
    return verdict("", "", results)


def check_reference(manifest: mf.Manifest) -> None:
    """Refuses a reference that names what the model does not have, or whose counts do not add up to its rows.

    Raises:
        Rejected: ``malformed_manifest``.
    """

    def require(condition: bool, where: str, expected: str) -> None:
        if not condition:
            raise Rejected("malformed_manifest", f"{where}: {expected}")

    reference = manifest.reference
    features = {feature.name for feature in manifest.features}
    outputs = {tensor.name: tensor for tensor in manifest.outputs}
    labels = {label for tensor in manifest.outputs for label in tensor.labels}
    for tensor in manifest.outputs:
        width = tensor.shape[-1] if tensor.shape else 1
        fits = not tensor.labels or width in (-1, len(tensor.labels))
        require(fits, f"outputs.{tensor.name}.labels", f"wanted {width}, got {len(tensor.labels)}")
    for name, column in reference.features.items():
        where = f"reference.features.{name}"
        require(name in features, where, "no such feature")
        total = sum(column.counts) + column.null
        require(
            total == reference.n, where, f"counts and nulls add up to {total}, the reference has {reference.n} rows"
        )
    for name, column in reference.outputs.items():
        where = f"reference.outputs.{name}"
        require(name in outputs, where, "no such output")
        wanted = len(outputs[name].labels)
        require(not wanted or len(column.counts) == wanted, where, f"wanted {wanted} counts, one per label")
    for label in reference.validated_error:
        require(label in labels, "reference.validated_error", f"{label!r} is no label of an output")
    for variant in manifest.variants:
        for label in variant.golden.minimum_recall:
            known = not labels or label in labels
            require(known, f"variant {variant.id}: golden.minimum_recall", f"{label!r} is no label of an output")


def _examine_variant(
    bundle: Bundle, variant: mf.Variant, machine: dict[str, str], at: Callable[[str], None]
) -> VariantResult:
    found = VariantResult(id=variant.id, runtime=variant.runtime, status="skipped")
    if variant.arch and machine["arch"] not in variant.arch:
        return msgspec.structs.replace(
            found, code="no_variant", detail=f"for {', '.join(variant.arch)}, this machine is {machine['arch']}"
        )
    if variant.runtime not in machine:
        return msgspec.structs.replace(found, code="runtime_missing", detail=f"no runtime for {variant.runtime} here")
    try:
        at(f"reading the graph of variant {variant.id}")
        _check_graph(bundle, variant)
        return _try_variant(bundle, variant, at)
    except BadInput as fault:
        return msgspec.structs.replace(found, status="failed", code="golden_failed", detail=str(fault))
    except BundleFault as fault:
        return msgspec.structs.replace(found, status="failed", code=fault.code, detail=fault.detail)


def _check_graph(bundle: Bundle, variant: mf.Variant) -> None:
    disk_mb = sum(file.size for file in variant.files) / 1e6
    if math.floor(disk_mb) > variant.needs.disk_mb:
        raise Rejected(
            "needs_understated", f"its files take {disk_mb:.1f} MB, needs.disk_mb is {variant.needs.disk_mb}"
        )
    path = bundle.path(variant.model)
    if variant.runtime == "onnx":
        onnx = precision.read_model(path)
        _check_listed(variant, precision.external_files(onnx))
        if variant.precision == "int8":
            precision.check_int8(onnx, name=variant.model)
    else:
        graph = precision_tflite.read_model(path)
        _check_listed(variant, graph.external_files)
        _check_variables(bundle.manifest, variant, graph)
        if variant.precision == "int8":
            precision_tflite.check_int8(graph, name=variant.model)


def _check_variables(manifest: mf.Manifest, variant: mf.Variant, graph: precision_tflite.Model) -> None:
    kept = any(operator.kind == "VAR_HANDLE" for part in graph.graphs for operator in part.operators)
    internal = manifest.streams is not None and manifest.streams.internal
    if kept and not internal:
        raise Rejected(
            "malformed_manifest",
            f"{variant.model} keeps variables from run to run: wanted streams.internal, or clients mix",
        )


def _check_listed(variant: mf.Variant, external: Iterable[str]) -> None:
    folder = Path(variant.model).parent
    listed = {file.path for file in variant.files}
    for name in sorted(external):
        if (folder / name).as_posix() not in listed:
            raise Rejected(
                "file_unlisted", f"{variant.model} keeps weights in {name!r}, which the variant does not list"
            )


def _try_variant(bundle: Bundle, variant: mf.Variant, at: Callable[[str], None]) -> VariantResult:
    gc.collect()
    _forget_peak()
    before_mb = _memory_mb("VmRSS")
    at(f"loading variant {variant.id}")
    start = time.perf_counter()
    loaded = runner.load(bundle, variant)
    load_ms = (time.perf_counter() - start) * 1e3
    at(f"proving variant {variant.id}")
    replay = proof.prove(loaded)
    batch_fault = proof.prove_batch(loaded) if replay.ok else ""
    at(f"timing variant {variant.id}")
    p50_us, p95_us = _time_runs(loaded) if replay.ok else (0.0, 0.0)
    streams_mb = 0.0
    if loaded.streams is not None and replay.ok:
        at(f"filling the streams of variant {variant.id}")
        streams_mb = _streams_mb(loaded, loaded.streams.most)
    added_mb = max(0.0, _memory_mb("VmHWM") - before_mb) + streams_mb
    code, detail = "", ""
    if not replay.ok or batch_fault:
        code, detail = "golden_failed", replay.detail or batch_fault
    elif added_mb > variant.needs.rss_mb:
        code, detail = "needs_understated", f"it takes {added_mb:.0f} MB, needs.rss_mb is {variant.needs.rss_mb}"
    return VariantResult(
        id=variant.id,
        runtime=variant.runtime,
        status="failed" if code else "passed",
        code=code,
        detail=detail,
        runtime_version=loaded.engine.runtime_version,
        load_ms=round(load_ms, 3),
        latency_p50_us=round(p50_us, 2),
        latency_p95_us=round(p95_us, 2),
        rss_mb=round(added_mb, 1),
        process_rss_mb=round(_memory_mb("VmHWM"), 1),
        proof=replay,
    )


def _time_runs(loaded: runner.Runner) -> tuple[float, float]:
    """Median and 95th percentile of one inference on the golden inputs in turn, microseconds."""
    cases = proof.read_cases(loaded.bundle, loaded.variant)
    infer = loaded.steady()
    took: list[int] = []
    for i in range(_WARM_RUNS + _TIMED_RUNS):
        inputs = cases[i % len(cases)].inputs
        start = time.perf_counter_ns()
        infer(inputs)
        took.append(time.perf_counter_ns() - start)
    ordered = sorted(took[_WARM_RUNS:])
    return ordered[len(ordered) // 2] / 1e3, ordered[int(len(ordered) * 0.95)] / 1e3


def _streams_mb(loaded: runner.Runner, most: int) -> float:
    """What more streams than are tried here would take, MB: those that are tried are in the peak."""
    inputs = proof.read_cases(loaded.bundle, loaded.variant)[0].inputs
    before_mb = _memory_mb("VmRSS")
    tried = [loaded.begin_stream() for _ in range(min(most, _MOST_TRIED_STREAMS))]
    for infer in tried:
        infer(inputs)
    each_mb = max(0.0, _memory_mb("VmRSS") - before_mb) / len(tried)
    return each_mb * (most - len(tried))


def _forget_peak() -> None:
    """Lets VmHWM start again from what is resident now (proc(5), clear_refs)."""
    try:
        fd = os.open("/proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return  # the peak then includes the imports: too high, never too low
    try:
        os.write(fd, b"5")
    except OSError:
        pass
    finally:
        os.close(fd)


def _memory_mb(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process in MB (1e6 bytes)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
