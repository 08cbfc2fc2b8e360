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
from skerry_runtime.delta.coder import U64, Decoder
from skerry_runtime.delta.container import PIECE, DeltaError, Numbers, Op, Patch, Role, Source
from skerry_runtime.delta.elements import (
    BY_EXPONENT,
    BY_SIZES,
    CHANNELS_MOST,
    FLOATS,
    OF_FLOATS,
    ONE_WIDTH,
    PLANES,
    PLANES_CHUNK,
    PRODUCTS,
    WIDTHS,
    WITH_BASE,
    Codec,
    Method,
    Scaling,
    Sizes,
    from_planes,
    tagged,
    to_bytes,
    to_integers,
    uncombined,
)
from skerry_runtime.delta.low_rank import EXPONENTS, FACTORS_MOST, RANKS, LowRank, leaning


def steps_most(target_size: int) -> int:
    """How many steps a patch may take for a target: each costs time however little it gives."""
    return 64 + target_size // 16


def element_steps_most(target_size: int) -> int:
    """How many of them may be of elements, which cost more."""
    return 256 + target_size // 512


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
        _Run(read, base_file, out).all()
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


class _Run:
    """The steps of a patch."""

    def __init__(self, patch: Patch, base_file: int, out: _Output) -> None:
        self._patch, self._out = patch, out
        self._base = _Base(base_file, patch.base_size)
        self._control = Numbers(self._stream(Role.CONTROL))
        self._planes = self._stream(Role.PLANES)
        self._coder = Decoder(self._stream(Role.WORDS), self._stream(Role.BITS))
        self._codec = Codec(self._coder)
        self._element_steps = element_steps_most(out.left)

    def _stream(self, role: Role) -> Source:
        return self._patch.streams.get(role, _Empty())

    def all(self) -> None:
        """Every step, until the target has its size."""
        for _ in range(steps_most(self._out.left)):
            if not self._out.left:
                break
            op = self._control.byte()
            if op == Op.ELEMENTS:
                self._elements()
            elif op in (Op.COPY, Op.ADD, Op.LITERAL):
                self._bytes(Op(op))
            else:
                raise DeltaError(f"the patch has a step {op}, which this version does not know")
        if self._out.left:
            raise DeltaError("the patch takes too many steps for its target")
        self._coder.finish()
        for source in self._patch.streams.values():
            source.finish()

    def _count(self, stride: int) -> int:
        n = self._control.unsigned()
        if not 0 < n <= self._out.left // stride:
            raise DeltaError("the patch gives more than its target holds")
        return n

    def _bytes(self, op: Op) -> None:
        n = self._count(1)
        if op != Op.LITERAL:
            self._base.move(self._control.signed(), n)
        source = self._stream(Role.LITERALS if op == Op.LITERAL else Role.DIFFERENCES)
        for start in range(0, n, PIECE):
            wanted = min(PIECE, n - start)
            if op == Op.LITERAL:
                self._out.write(source.take(wanted))
            elif op == Op.COPY:
                self._out.write(self._base.take(wanted))
            else:
                old = np.frombuffer(self._base.take(wanted), np.uint8)
                self._out.write((old + np.frombuffer(source.take(wanted), np.uint8)).tobytes())

    def _elements(self) -> None:
        self._element_steps -= 1
        if self._element_steps < 0:
            raise DeltaError("the patch takes too many steps for its target")
        number, width, tag = self._control.byte(), self._control.byte(), self._control.byte()
        if number not in set(Method) or width not in WIDTHS:
            raise DeltaError(f"the patch has a method {number} of {width} bytes, which this version does not know")
        method = Method(number)
        if (method in OF_FLOATS and width not in FLOATS) or width != ONE_WIDTH.get(method, width):
            raise DeltaError(f"the patch uses {method.name.lower()} for elements of {width} bytes")
        stride = width + (tag != 0)
        n = self._count(stride)
        if method in WITH_BASE:
            self._base.move(self._control.signed(), n * stride)
        low = self._control.unsigned() if method in BY_EXPONENT else 0
        if low >= 1 << 16:
            raise DeltaError("the patch has an exponent that no float has")
        scaling = self._scaling(n) if method == Method.RESCALED else None
        sizes = self._sizes(n) if method in BY_SIZES else None
        product = None
        if method in PRODUCTS:
            assert sizes is not None
            product = self._product(len(sizes.rows), len(sizes.columns))
            if method == Method.LOW_RANK_LEANING:
                product = leaning(product, sizes.rows, sizes.columns)
        start = 0
        while start < n:
            room = PLANES_CHUNK if method in PLANES else self._codec.room(method, width)
            wanted = min(room, n - start)
            base = self._beside(wanted, width, stride) if method in WITH_BASE else None
            if method in PLANES:
                found = uncombined(method, width, from_planes(self._planes.take(wanted * width), width), base)
            else:
                found = self._codec.run(method, width, start, base, None, wanted, low, scaling, sizes, product)
            self._out.write(tagged(to_bytes(found, width), width, tag))
            start += wanted

    def _beside(self, n: int, width: int, stride: int) -> U64:
        data = np.frombuffer(self._base.take(n * stride), np.uint8)
        return to_integers(np.ascontiguousarray(data.reshape(n, stride)[:, stride - width :]).ravel(), width)

    def _sizes(self, n: int) -> Sizes:
        rows = self._control.unsigned()
        if not 0 < rows <= n or n % rows or rows + n // rows > CHANNELS_MOST:
            raise DeltaError("the patch has more rows or columns than there are")
        return self._codec.sizes(rows, n // rows, None)

    def _product(self, rows: int, columns: int) -> LowRank:
        rank, exponent = self._control.unsigned(), self._control.signed()
        if not 0 < rank <= min(RANKS[-1], FACTORS_MOST // (rows + columns)) or exponent not in EXPONENTS:
            raise DeltaError("the patch adds a product that is larger than a device keeps")
        return self._codec.product(rows, columns, rank, exponent, None)

    def _scaling(self, n: int) -> Scaling:
        count, inner, offset = self._control.unsigned(), self._control.unsigned(), self._control.signed()
        if not 0 < count <= min(n, CHANNELS_MOST) or not 0 < inner <= n or abs(offset) > 255:
            raise DeltaError("the patch scales by more channels than there are")
        ratios = np.empty(count, np.int64)
        for place in range(count):
            ratio = self._control.signed()
            if abs(ratio) >= 1 << 23:
                raise DeltaError("the patch scales by too much")
            ratios[place] = ratio
        return Scaling(ratios=ratios, inner=inner, offset=offset)
