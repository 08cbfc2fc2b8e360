"""Bundles on the operator's disk: build from a spec, read, and check against their own digests.

A bundle is a folder: ``manifest.json``, the files it lists, and beside them perhaps ``model.sig``. The contract package says
what a manifest may hold; this module adds only the reading and writing of files. A spec is the manifest without what can be
computed: a variant's ``files`` are paths below the spec's folder, digests and sizes are filled in here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry_contract import canonical, ids, layout, sealed
from skerry_contract import manifest as m
from skerry_contract.errors import ContractError

from skerry_cli import sealing
from skerry_cli.errors import Failed, RefusedForSafety, Usage

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle that was read from a folder. Its files are not checked until ``check_files``."""

    folder: Path
    data: bytes
    manifest: m.Manifest
    signature: bytes | None

    @property
    def digest(self) -> ids.BundleDigest:
        """The identity: sha256 of the manifest's bytes."""
        return m.digest(self.data)


def read_spec(path: Path) -> dict[str, Any]:
    """Reads a spec: TOML, with other TOML or JSON files merged in by its top-level ``include = [paths]``.

    Raises:
        Usage: a file is missing or does not parse, or two files set the same key.
    """
    spec = _read_table(path)
    included = spec.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise Usage(f"{path}: include: wanted a list of paths")
    for name in included:
        part = _read_table(path.parent / name)
        twice = sorted(set(part) & set(spec))
        if twice:
            raise Usage(f"{path.parent / name}: {', '.join(twice)} stands in {path.name} too")
        spec.update(part)
    return spec


def build_bundle(
    spec: Mapping[str, Any],
    *,
    source: Path,
    out: Path,
    created: str,
    what: str = "bundle spec",
    content_key: bytes | None = None,
) -> Bundle:
    """Makes a bundle's folder.

    Args:
        spec: the manifest's fields as builtins; ``schema`` and ``created`` may be left out; a variant's ``files`` is a list of
            paths below ``source``, or of ``{path, from}`` when the bundle's path differs from the source's.
        source: folder that the paths start from.
        out: folder to make; refused when it exists and is not empty.
        created: RFC 3339 UTC, used when the spec has none.
        what: the spec's file, for what is said of it.
        content_key: every file is encrypted with it on its way up; the folder made here holds them in the clear.

    Raises:
        Usage: a file is missing, a path leaves the folder, or the contract refuses the manifest; the message says where.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Usage(f"{out}: exists and is not empty; wanted a new folder")
    fields: dict[str, Any] = {"schema": m.SCHEMA, "created": created, **spec}
    sources: dict[str, Path] = {}
    fields["variants"] = [
        _with_files(variant, f"{what}: $.variants[{i}]", source, sources, content_key)
        for i, variant in enumerate(_list(fields.get("variants"), f"{what}: $.variants"))
    ]
    if content_key is not None:
        fields["encryption"] = {"scheme": sealed.SCHEME, "key_id": sealed.key_id(content_key)}
        fields["requires"] = sorted({*_list(fields.get("requires", []), f"{what}: $.requires"), "encrypted"}, key=str)
    try:
        data = canonical.encode(fields)
        manifest = m.parse(data)
    except ContractError as error:
        raise Usage(f"{what}: {error}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise Usage(f"{what}: cannot be written as JSON: {error}") from None
    # Built beside its place and renamed: a folder with this name is always whole.
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        for path, origin in sources.items():
            target = staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, target)
        (staging / m.MANIFEST_FILE).write_bytes(data)
        if out.exists():
            out.rmdir()
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(out)
    except OSError as error:
        raise Failed(f"{out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    bundle = Bundle(folder=out, data=data, manifest=manifest, signature=None)
    check_files(bundle)
    return bundle


def read_bundle(folder: Path) -> Bundle:
    """Reads a bundle's manifest and signature.

    Raises:
        Usage: no bundle there, or a manifest that the contract refuses.
    """
    path = folder / m.MANIFEST_FILE
    try:
        if path.stat().st_size > m.MAX_BYTES:
            raise Usage(f"{path}: wanted at most {m.MAX_BYTES} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        raise Usage(f"{folder}: no {m.MANIFEST_FILE}; wanted a bundle's folder") from None
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}") from None
    try:
        manifest = m.parse(data)
    except ContractError as error:
        raise Usage(f"{path}: {error}") from None
    signature = folder / m.SIGNATURE_FILE
    return Bundle(
        folder=folder, data=data, manifest=manifest, signature=signature.read_bytes() if signature.is_file() else None
    )


def check_files(bundle: Bundle) -> None:
    """Compares every file with the manifest.

    Raises:
        RefusedForSafety: a file is missing, differs in size or digest, is no plain file, or is not listed.
    """
    listed = {file.path: file for file in bundle.manifest.files()}
    for path, file in listed.items():
        place = bundle.folder / path
        if place.is_symlink() or not place.is_file():
            raise RefusedForSafety(f"{place}: missing; the manifest lists it")
        size = place.stat().st_size
        wanted = file.content
        if size != wanted.size:
            raise RefusedForSafety(f"{place}: {size} bytes; the manifest says {wanted.size}")
        found = sha256_of(place)
        if found != wanted.sha256:
            raise RefusedForSafety(f"{place}: sha256 {found[:12]}...; the manifest says {wanted.sha256[:12]}...")
    beside = {m.MANIFEST_FILE, m.SIGNATURE_FILE}
    for place in sorted(bundle.folder.rglob("*")):
        name = place.relative_to(bundle.folder).as_posix()
        if (place.is_symlink() or not place.is_dir()) and name not in listed and name not in beside:
            raise RefusedForSafety(f"{place}: the manifest does not list it")


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in pieces.

    Raises:
        Usage: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}") from None
    return digest.hexdigest()


def _with_files(
    variant: Any, where: str, source: Path, sources: dict[str, Path], content_key: bytes | None
) -> dict[str, Any]:
    if not isinstance(variant, Mapping):
        raise Usage(f"{where}: wanted a table, got {type(variant).__name__}")
    files: list[dict[str, Any]] = []
    for entry in _list(variant.get("files"), f"{where}.files"):
        path, origin = (entry.get("path"), entry.get("from")) if isinstance(entry, Mapping) else (entry, entry)
        try:
            path = layout.bundle_path(path)
        except ContractError as error:
            raise Usage(f"{where}.files: {error}") from None
        if not isinstance(origin, str):
            raise Usage(f"{where}.files: {path}: from: wanted a path, got {origin!r}")
        place = source / origin
        if not place.is_file():
            raise Usage(f"{where}.files: {place}: no such file")
        if sources.setdefault(path, place) != place:
            raise Usage(f"{where}.files: {path} is listed twice from different files")
        file = {"sha256": sha256_of(place), "size": place.stat().st_size}
        if content_key is not None:
            sha256, size = sealing.stored(place, content_key, str(file["sha256"]))
            file = {"sha256": sha256, "size": size, "plain": file}
        files.append({"path": path, **file})
    return {**variant, "files": files}


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise Usage(f"{where}: wanted a list, got {type(value).__name__}")
    return list(value)


def _read_table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise Usage(f"{path}: no such file") from None
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # both decode errors are ValueErrors
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise Usage(f"{path}: wanted {kind}: {error}") from None
    if not isinstance(value, dict):
        raise Usage(f"{path}: wanted a table, got {type(value).__name__}")
    return value
