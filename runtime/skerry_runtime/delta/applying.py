"""From base and patch to target, piece by piece.

Memory does not grow with the files. What a patch may ask for is bounded before it is done: every step gives at least one byte
of a target whose size was signed, and steps are few beside its bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np

from skerry_runtime.delta import container
from skerry_runtime.delta.container import PIECE, DeltaError, Numbers, Op, Patch, Role, Source


def steps_most(target_size: int) -> int:
    """How many steps a patch may take for a target: each costs time however little it gives."""
    return 64 + target_size // 16


def apply(base: Path, patch: Path, target: Path, *, sha256: str, size: int) -> None:
    """See ``skerry_runtime.delta.apply``."""
    # One name: what a power cut leaves of it is written over by the next attempt.
    beside = target.with_name(f".{target.name}.patching")
    with contextlib.ExitStack() as stack:
        base_file = _open(stack, base)
        patch_file = _open(stack, patch)
        read = container.read(patch_file)
        if read.target_size != size:
            raise DeltaError(f"the patch gives {read.target_size} bytes, not the {size} that were signed")
        _check_base(base_file, read)
        out = stack.enter_context(_Output(beside, size))
        _run(read, base_file, out)
        if out.digest() != sha256:
            raise DeltaError("what the patch gives is not the file that was signed")
        out.keep_as(target)


def _open(stack: contextlib.ExitStack, path: Path) -> int:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, file)
    return file


def _check_base(file: int, patch: Patch) -> None:
    if os.fstat(file).st_size != patch.base_size:
        raise DeltaError("the patch is for another base: its size differs")
    digest = hashlib.sha256()
    at = 0
    while piece := os.pread(file, PIECE, at):
        digest.update(piece)
        at += len(piece)
    if digest.digest() != patch.base_digest:
        raise DeltaError("the patch is for another base: its digest differs")


class _Output:
    """The target as it grows, with its digest; removed unless kept."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self.left = path, size
        self._digest = hashlib.sha256()
        self._kept = False

    def __enter__(self) -> _Output:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(self._path, flags, 0o644), "wb")
        return self

    def write(self, data: bytes) -> None:
        self.left -= len(data)
        self._digest.update(data)
        self._file.write(data)

    def digest(self) -> str:
        return self._digest.hexdigest()

    def keep_as(self, target: Path) -> None:
        self._file.close()
        self._path.replace(target)
        self._kept = True

    def __exit__(self, *exc: object) -> None:
        # A full disk speaks at the latest here, and was heard before when the file is kept.
        with contextlib.suppress(OSError):
            self._file.close()
        if not self._kept:
            self._path.unlink(missing_ok=True)


class _Base:
    """The base, read from where the last step ended unless a step says otherwise."""

    def __init__(self, file: int, size: int) -> None:
        self._file, self._size, self._at = file, size, 0

    def move(self, by: int, n: int) -> None:
        """Goes ``by`` bytes on or back, to where ``n`` bytes will be read."""
        self._at += by
        if not 0 <= self._at <= self._size - n:
            raise DeltaError("the patch reads outside of its base")

    def take(self, n: int) -> bytes:
        data = os.pread(self._file, n, self._at)
        if len(data) != n:
            raise DeltaError("the base became shorter meanwhile")
        self._at += n
        return data


class _Empty:
    """A stream that the patch does not have."""

    def take(self, n: int) -> bytes:
        raise DeltaError(f"the patch wants {n} bytes of a stream that it does not have")

    def finish(self) -> None:
        pass


def _run(patch: Patch, base_file: int, out: _Output) -> None:
    def stream(role: Role) -> Source:
        return patch.streams.get(role, _Empty())

    base = _Base(base_file, patch.base_size)
    control = Numbers(stream(Role.CONTROL))
    differences, literals = stream(Role.DIFFERENCES), stream(Role.LITERALS)
    for _ in range(steps_most(out.left)):
        if not out.left:
            break
        op = control.byte()
        n = control.unsigned()
        if op not in (Op.COPY, Op.ADD, Op.LITERAL):
            raise DeltaError(f"the patch has a step {op}, which this version does not know")
        if not 0 < n <= out.left:
            raise DeltaError("the patch gives more than its target holds")
        if op != Op.LITERAL:
            base.move(control.signed(), n)
        for start in range(0, n, PIECE):
            wanted = min(PIECE, n - start)
            if op == Op.LITERAL:
                out.write(literals.take(wanted))
            elif op == Op.COPY:
                out.write(base.take(wanted))
            else:
                old = np.frombuffer(base.take(wanted), np.uint8)
                out.write((old + np.frombuffer(differences.take(wanted), np.uint8)).tobytes())
    if out.left:
        raise DeltaError("the patch takes too many steps for its target")
    for source in patch.streams.values():
        source.finish()
