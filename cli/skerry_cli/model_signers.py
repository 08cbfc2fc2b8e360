"""Whose ``model.sig`` an approver wants to see before a bundle goes into the catalog: their own list, whatever a server says.

Wraps where a bundle comes from, so that every way of approving looks. The register hands out the signature and is not believed:
it must hold under one of the approver's keys, over exactly the manifest that is fetched and the files that it lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from skerry_contract import manifest as m
from skerry_contract.errors import ContractError
from skerry_runtime import signature as signatures
from skerry_runtime.errors import BundleFault

from skerry_cli import signing
from skerry_cli.bundle_source import BundleSource
from skerry_cli.errors import RefusedForSafety, Usage


def read(place: Path) -> dict[str, bytes]:
    """The keys of a file, or of a folder's ``*.pem`` and ``*.pub.json``: name -> public key in PEM.

    Raises:
        Usage: there is none, or a file holds no public key on P-256.
    """
    files = sorted([*place.glob("*.pem"), *place.glob("*.pub.json")]) if place.is_dir() else [place]
    keys: dict[str, bytes] = {}
    for file in files:
        pem = signing.public_key(file)
        try:
            signatures.require_public_key(pem)
        except ValueError as error:
            raise Usage(f"{file}: {error}; wanted the public key of one who signs bundles") from None
        keys[file.name.removesuffix(".pem").removesuffix(".pub.json")] = pem
    if not keys:
        raise Usage(f"{place}: wanted public keys of those who sign bundles, *.pem or *.pub.json")
    return keys


class SignedSource:
    """A bundle's source whose manifests count only with a good signature.

    Args:
        fetch: digest -> ``model.sig``, None when there is none.
        say: told who signed what.
    """

    def __init__(
        self,
        source: BundleSource,
        keys: Mapping[str, bytes],
        fetch: Callable[[str], bytes | None],
        say: Callable[[str], None],
    ) -> None:
        self._source = source
        self._keys = keys
        self._fetch = fetch
        self._say = say

    def manifest(self, digest: str) -> bytes:
        """See ``BundleSource``. Raises ``RefusedForSafety`` when none of the keys signed the bundle."""
        data = self._source.manifest(digest)
        signature = self._fetch(digest)
        names = ", ".join(self._keys)
        if signature is None:
            raise RefusedForSafety(f"bundle {digest[:12]}: it has no model.sig; wanted one by {names}")
        found = ""
        for name, pem in self._keys.items():
            try:
                signatures.covers_manifest(signature, pem, data)
            except (BundleFault, ContractError) as error:
                found = str(error)
                continue
            self._say(f"bundle {digest[:12]}: its files were signed by {name}")
            return data
        raise RefusedForSafety(f"bundle {digest[:12]}: its model.sig holds under none of {names}: {found}")

    def blob(self, file: m.File) -> Iterator[bytes]:
        """See ``BundleSource``."""
        return self._source.blob(file)

    def content_key(self, digest: str) -> bytes:
        """See ``BundleSource``."""
        return self._source.content_key(digest)
