"""What making a patch says about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of the target and how the patch gives it.

    Attributes:
        name: of the tensor, as the model calls it; empty for bytes that belong to none.
        method: ``copy``, ``add``, ``literal``, or one of a tensor's.
        size_bytes: in the target.
    """

    name: str
    method: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Attributes.

    kind: ``onnx``, ``tflite`` or ``bytes``.
    size_bytes: of the patch.
    base_bytes, target_bytes: of the files.
    segments: in the order of the target.
    seconds: it took.
    """

    kind: str
    size_bytes: int
    base_bytes: int
    target_bytes: int
    segments: tuple[Segment, ...]
    seconds: float

    def bytes_by_method(self) -> dict[str, int]:
        """Bytes of the target by the method that gives them."""
        sums: dict[str, int] = {}
        for segment in self.segments:
            sums[segment.method] = sums.get(segment.method, 0) + segment.size_bytes
        return dict(sorted(sums.items()))
