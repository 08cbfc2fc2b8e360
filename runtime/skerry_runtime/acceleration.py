"""What a model should run on: execution providers, delegates, threads. Values only; engines act on them.

Whatever is wished for, a model that it does not take runs on the CPU instead: an accelerator makes answers sooner, it is no
condition for them. The engine says what it runs on and why it is not what was wished for.
"""

from __future__ import annotations

import msgspec


class Delegate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A delegate of TFLite: the path of its library, and options as it takes them."""

    library: str
    options: dict[str, str] = {}


class Acceleration(msgspec.Struct, frozen=True, kw_only=True):
    """Wishes, for both runtimes.

    Attributes:
        threads: within one inference, on the CPU.
        providers: execution providers of ONNX Runtime, the preferred first; the CPU's is always the last.
        provider_options: by provider.
        delegates: of TFLite, all of them together.
        xnnpack: whether TFLite may use the CPU kernels of XNNPACK, which it does by itself.
    """

    threads: int = 1
    providers: tuple[str, ...] = ()
    provider_options: dict[str, dict[str, str]] = {}
    delegates: tuple[Delegate, ...] = ()
    xnnpack: bool = True

    def wishes(self, runtime: str) -> bool:
        """Whether anything but the CPU is wished for."""
        return bool(self.delegates if runtime == "tflite" else self.providers)

    def on_cpu(self) -> Acceleration:
        """The same without accelerators."""
        return msgspec.structs.replace(self, providers=(), provider_options={}, delegates=())


CPU = Acceleration()
