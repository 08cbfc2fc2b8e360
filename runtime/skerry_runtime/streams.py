"""What stateful models remember between the inferences of one stream, and of how many streams.

Three things can look back: state tensors, which the model gives and takes again (``streams.states``); variables inside a
TFLite interpreter (``streams.internal``); and steps that look back (``lag``, ``rolling``). A ``Stream`` holds them for one
client, beginning from zeros; ``StreamTable`` holds at most ``streams.most`` of them, the quietest goes first, and none longer
than ``streams.idle_s`` after its last inference.

An inference that fails leaves its stream as it was, so that it can be sent again. Only an interpreter cannot be put back: its
stream ends with the failure.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from skerry_contract import manifest as mf

from skerry_runtime.errors import EngineFailed
from skerry_runtime.tensors import DTYPES, Array, Tensors

Clock = Callable[[], float]
Computing = Callable[[Tensors], Any]
"""One stream's inference, past all guards: it remembers what the next one needs."""


class Sequence(NamedTuple):
    """Which stream a request belongs to, in the words of the protocol's sequence extension.

    Attributes:
        id: the client's name for it; start: begin it anew; end: forget it after this one.
        of: whose name it is: two clients that are told apart may use one name for two streams.
    """

    id: int | str
    start: bool = False
    end: bool = False
    of: str = ""


class States:
    """The state tensors of one stream."""

    __slots__ = ("_specs", "now")

    def __init__(self, specs: tuple[mf.StateTensor, ...]) -> None:
        self._specs = specs
        self.now: Tensors = {spec.input: np.zeros(spec.shape, DTYPES[spec.datatype]) for spec in specs}

    def take(self, outputs: Tensors) -> Tensors:
        """The next states, out of what the model gave.

        Raises:
            EngineFailed: ``model_failed``: one has another shape than the manifest says.
        """
        found: Tensors = {}
        for spec in self._specs:
            array: Array = outputs.pop(spec.output)
            if array.shape != spec.shape:
                detail = f"state {spec.output}: wanted shape {list(spec.shape)}, got {list(array.shape)}"
                raise EngineFailed("model_failed", detail)
            found[spec.input] = array
        return found


class StreamTable:
    """The streams of one model. May be called from several threads; inferences take turns.

    Attributes:
        begun, ended: how many streams began; and how many were let go for room or because they were quiet.
    """

    def __init__(self, settings: mf.Streams, begin: Callable[[], Computing], *, clock: Clock) -> None:
        """Takes the manifest's settings, what makes a stream, and a monotonic clock in seconds."""
        self._settings = settings
        self._begin = begin
        self._clock = clock
        self._lock = threading.Lock()
        self._streams: OrderedDict[tuple[str, int | str], tuple[Computing, float]] = OrderedDict()
        self.begun = self.ended = 0

    def __len__(self) -> int:
        return len(self._streams)

    def infer(self, sequence: Sequence, inputs: Tensors) -> tuple[Any, bool]:
        """The answer, and whether the stream began with it.

        Raises:
            EngineFailed: as the model's own inference does.
        """
        with self._lock:
            self._forget_quiet()
            key = sequence.of, sequence.id
            known = self._streams.pop(key, None)
            began = sequence.start or known is None
            if known is None or sequence.start:
                while len(self._streams) >= self._settings.most:
                    self._streams.popitem(last=False)
                    self.ended += 1
                known = None  # before its successor is made: two interpreters of one stream are one too many
                stream = self._begin()
                self.begun += 1
            else:
                stream = known[0]
            try:
                found = stream(inputs)
            except Exception:
                if not self._settings.internal and not began:
                    self._streams[key] = (stream, self._clock())
                raise
            if not sequence.end:
                self._streams[key] = (stream, self._clock())
            return found, began

    def forget_quiet(self) -> None:
        """Lets go of streams that were quiet for too long; ``infer`` does so too."""
        with self._lock:
            self._forget_quiet()

    def _forget_quiet(self) -> None:
        limit = self._clock() - self._settings.idle_s
        while self._streams:
            key = next(iter(self._streams))
            if self._streams[key][1] > limit:
                return
            del self._streams[key]
            self.ended += 1
