"""Which models must not leave this machine, or be signed, in the clear: the operator's own list, whatever a server says.

``push`` looks before a byte is sent; ``approve`` looks through the source of each bundle that comes into the catalog. A server has a list
too (``policy.encrypted_models``), which a thief of it can drop.
"""

from __future__ import annotations

from collections.abc import Iterator

from skerry_contract import ids
from skerry_contract import manifest as m
from skerry_contract.errors import ContractError

from skerry_cli.bundle_source import BundleSource
from skerry_cli.errors import RefusedForSafety, Usage

EVERY = "*"


def read(text: str, where: str) -> frozenset[str]:
    """Names of models, with commas or blanks between; ``*`` for all. Raises ``Usage``.

    >>> sorted(read("gas, oil", "here"))
    ['gas', 'oil']
    """
    named = frozenset(text.replace(",", " ").split())
    for name in named - {EVERY}:
        try:
            ids.model_name(name)
        except ContractError as error:
            raise Usage(f"{where}: wanted names of models, or {EVERY}: {error}") from None
    return named


def require(manifest: m.Manifest, asked: frozenset[str]) -> None:
    """Raises ``RefusedForSafety`` for a bundle in the clear of a model that must be encrypted."""
    if manifest.encryption is None and (manifest.model in asked or EVERY in asked):
        raise RefusedForSafety(
            f"{manifest.model}@{manifest.version} is in the clear; your encrypted_models asks for encryption",
            advice="build it with `skerry bundle build --encrypt`",
        )


class EncryptedSource:
    """A bundle's source whose manifests count only encrypted where that is asked for."""

    def __init__(self, source: BundleSource, asked: frozenset[str]) -> None:
        self._source = source
        self._asked = asked

    def manifest(self, digest: str) -> bytes:
        """See ``BundleSource``. Raises as ``require``; what is no manifest its caller refuses."""
        data = self._source.manifest(digest)
        try:
            manifest = m.parse(data)
        except ContractError:
            return data
        require(manifest, self._asked)
        return data

    def blob(self, file: m.File) -> Iterator[bytes]:
        """See ``BundleSource``."""
        return self._source.blob(file)

    def content_key(self, digest: str) -> bytes:
        """See ``BundleSource``."""
        return self._source.content_key(digest)
