"""Loads and proves a granted bundle in this process, as a worker does: every hash, every golden case, before the first inference.

A bundle that this user may not read comes file by file as descriptors, into a folder of its own that is gone when the model
is loaded; its digest is checked like any other's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from skerry_contract import manifest as m
from skerry_runtime import proof
from skerry_runtime.bundle import open_bundle
from skerry_runtime.errors import BundleFault
from skerry_runtime.runner import Runner, load
from skerry_runtime.streams import StreamTable
from skerry_runtime.tensors import DTYPES

from skerry_agent import workerwire as ww
from skerry_agent.errors import Degraded, Rejected

Fetch = Callable[[str, str], int]
"""(digest, path) -> descriptor of the file; raises ``OSError`` when it does not come."""


class Loaded:
    """A bundle that proved itself here.

    Attributes:
        dtypes: of its inputs, for values that come as lists.
        streams: of a stateful model; None of others.
    """

    def __init__(self, served: ww.Served, runner: Runner) -> None:
        self.served = served
        self.runner = runner
        self.manifest = runner.bundle.manifest
        streams = runner.streams
        self.streams = None if streams is None else StreamTable(streams, runner.begin_stream, clock=time.monotonic)
        self.dtypes: dict[str, npt.DTypeLike] = {
            tensor.name: DTYPES.get(tensor.datatype, np.dtype(object)) for tensor in self.manifest.inputs
        }


def load_and_prove(served: ww.Served, fetch: Fetch) -> Loaded:
    """Loads what was granted.

    Raises:
        Rejected, Degraded: with a code of the update vocabulary; it does not run here.
    """
    try:
        if os.access(Path(served.path) / m.MANIFEST_FILE, os.R_OK):
            return _load(served, served.path)
        with tempfile.TemporaryDirectory(prefix="skerry-") as folder:
            _collect(served, Path(folder), fetch)
            return _load(served, folder)
    except BundleFault as error:
        if error.code in ("runtime_missing", "out_of_memory"):
            raise Degraded(error.code, error.detail, advice="install the runtime beside the application") from error
        raise Rejected(error.code, error.detail, model=served.name) from error
    except MemoryError as error:
        raise Degraded("not_enough_memory", "loading the model") from error
    except OSError as error:
        raise Degraded("model_damaged", f"{type(error).__name__}: {error}") from error


def _load(served: ww.Served, folder: str) -> Loaded:
    bundle = open_bundle(folder, digest=served.digest, variants=[served.variant])
    runner = load(bundle, served.variant)
    found = proof.prove(runner)
    if not found.ok:
        raise Rejected("golden_failed", found.detail, model=served.name)
    return Loaded(served, runner)


def _collect(served: ww.Served, folder: Path, fetch: Fetch) -> None:
    _copy(fetch(served.digest, m.MANIFEST_FILE), folder / m.MANIFEST_FILE)
    raw = (folder / m.MANIFEST_FILE).read_bytes()
    if m.digest(raw) != served.digest:
        raise Rejected("hash_mismatch", f"manifest.json: wanted bundle {served.digest}, got {m.digest(raw)}")
    for file in m.parse(raw).variant(served.variant).files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(fetch(served.digest, file.path), target)


def _copy(descriptor: int, target: Path) -> None:
    with open(descriptor, "rb") as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
