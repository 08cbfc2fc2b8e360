"""Whose ``model.sig`` a bundle must carry, where the operator says so: ``policy.model_signers``.

Reads the public keys once and judges a signature against a manifest. It says who made the files, before anybody approves them; what
devices run is decided by the approvers' catalog, and no device looks at this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from skerry_runtime import signature as signatures
from skerry_runtime.errors import BundleFault

from skerry_server.errors import BadSettings

UNSIGNED, UNTRUSTED = "unsigned", "untrusted_signature"


class ModelSigners:
    """The keys of which one must have signed a bundle; none asks for no signature.

    Args:
        keys: name -> public key in PEM (ECDSA P-256).
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = dict(keys)

    @classmethod
    def read(cls, files: Sequence[str], data: Path) -> ModelSigners:
        """The keys in files, which may lie below the data folder.

        Raises:
            BadSettings: with every file that holds no such key.
        """
        keys: dict[str, bytes] = {}
        faults = []
        for file in files:
            try:
                pem = (data / file).read_bytes()
                signatures.require_public_key(pem)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                faults.append(f"policy.model_signers: {file}: wanted a public key in PEM (P-256): {reason}")
                continue
            keys[Path(file).stem] = pem
        if faults:
            raise BadSettings(faults)
        return cls(keys)

    @property
    def wanted(self) -> bool:
        """Whether bundles must be signed here."""
        return bool(self._keys)

    def judge(self, manifest: bytes, signature: bytes | None) -> tuple[str, str]:
        """Looks at a bundle's signature; returns (code, words): the code is empty when it holds, and the words name the signer."""
        if not self._keys:
            return "", ""
        names = ", ".join(self._keys)
        if signature is None:
            return UNSIGNED, f"this server takes bundles signed by {names}; this one has no model.sig"
        found = ""
        for name, pem in self._keys.items():
            try:
                signatures.covers_manifest(signature, pem, manifest)
            except BundleFault as error:
                found = str(error)
                continue
            return "", name
        return UNTRUSTED, f"model.sig holds under none of {names}: {found}"
