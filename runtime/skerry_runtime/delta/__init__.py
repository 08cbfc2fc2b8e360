"""Deltas made for models: what a device needs beside the file it has to get the file it should have.

``make`` writes a patch, ``apply`` makes the target from base and patch. A patch is material, never an authority: whoever made
it, what comes out either has the digest that signed metadata names or is not left on the disk. Nothing here decides who makes,
serves or asks for one. The format is in docs/reference/formats.md, the reasons in docs/explanation/deltas.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skerry_runtime.delta.container import DeltaError

if TYPE_CHECKING:
    from pathlib import Path

    from skerry_runtime.delta.summary import Summary

__all__ = ["DeltaError", "apply", "make"]


def make(base: Path, target: Path, patch: Path) -> Summary:
    """Writes the patch that turns ``base`` into ``target``; the same files give the same bytes.

    What the files are is found by their content: ONNX, TFLite, or bytes. Needs some twenty times the memory of both
    files, and 160 times that of what lies outside of matched tensors, of which more than 8 MB are not searched.

    Raises:
        OSError: a file cannot be read or written.
    """
    from skerry_runtime.delta.making import make as run

    return run(base, target, patch)


def apply(base: Path, patch: Path, target: Path, *, sha256: str, size: int) -> None:
    """Makes ``target`` of ``base`` and ``patch``, beside it first, so that ``target`` is whole or not there.

    It is not flushed to the disk: that is the caller's, who knows when.

    Args:
        base: the file the patch was made for; refused when it is another.
        patch: from anyone.
        target: replaced when it exists.
        sha256: of the target, in lower-case hex, from signed metadata: it decides.
        size: of the target, in bytes, from signed metadata.

    Raises:
        DeltaError: the patch is damaged, for another base, or gives another file. ``target`` is as it was.
        OSError: a file cannot be read or written.
    """
    from skerry_runtime.delta.applying import apply as run

    run(base, patch, target, sha256=sha256, size=size)
