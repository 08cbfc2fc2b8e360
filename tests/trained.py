"""Bundles of the demo's model, each trained once per pytest process: training one takes two seconds of a core."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

from skerry_cli.demo import models
from skerry_cli.demo.models import Made

CREATED = "2026-01-01T00:00:00Z"


@functools.cache
def _folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="skerry-trained-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@functools.cache
def _made(version: str, batches: tuple[int, ...], seed: int) -> Made:
    out = _folder() / f"{version}-{'-'.join(map(str, batches))}-{seed}"
    return models.make_bundle(out, version=version, batches=batches, created=CREATED, seed=seed)


def make_bundle(out: Path, *, version: str, batches: tuple[int, ...], seed: int = 0) -> Made:
    """As ``models.make_bundle``, at ``out``: a copy, which the caller may change."""
    made = _made(version, batches, seed)
    shutil.copytree(made.bundle.folder, out)
    return dataclasses.replace(made, bundle=dataclasses.replace(made.bundle, folder=out))
