"""Content keys of encrypted bundles on the device: asked for once, kept wrapped, opened in a courier alone.

``slots/.keys/<digest>.json`` is what the server gave, over the network or in a folder that was carried here: a secret only for whoever has the device's encryption key besides. So a device that was
given a bundle once opens it ever after, without any network.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import ids, layout, sealed
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError

from skerry_agent.courier import device_api, durable, encryption_key, folder, requests
from skerry_agent.errors import Degraded, Rejected, Transient

KEYS = ".keys"
"""Below the folder of slots."""


def obtain(request: requests.Common, manifest: manifests.Manifest, digest: str) -> bytes:
    """The content key of an encrypted bundle: of what is kept here, else of the server.

    Raises:
        Transient: ``key_not_given``: the server does not give it now: its group has moved on, or the key never came there.
        Degraded: ``encryption_key_differs``, ``encryption_key_unusable``, ``not_enrolled``.
        Rejected: ``malformed_answer``: what came does not open, or is another bundle's key.
    """
    assert manifest.encryption is not None
    holder = encryption_key.holder(request.identity, request.encryption_key)
    device = device_api.device_id(request)
    path = Path(request.state_dir) / "slots" / KEYS / f"{ids.bundle_digest(digest)}.json"
    kept = _kept(path)
    if kept is not None:
        try:
            return _opened(kept, holder, device, digest, manifest.encryption.key_id)
        except sealed.CannotOpen:
            # Of an encryption key that was replaced, or damaged: a new one is asked for.
            pass
    known = device_api.enrolled(request)
    try:
        answer = known.api.content_key(known.key, known.device, digest, encryption_key.public_pem(holder))
    except Rejected as error:
        raise _of_server(error) from None
    try:
        wrapped = sealed.decode_wrapped(answer.get("wrapped"))
        found = _opened(wrapped, holder, device, digest, manifest.encryption.key_id)
    except (ContractError, sealed.CannotOpen) as error:
        raise Rejected("malformed_answer", f"content key of {digest[:12]}: {error}") from None
    durable.make_folder(path.parent)
    durable.write(path, json.dumps(sealed.encode_wrapped(wrapped)).encode() + b"\n", mode=0o600)
    return found


def bring(request: requests.Common, manifest: manifests.Manifest, digest: str) -> str:
    """Takes the wrapped key from the folder that was carried here, where it opens; ``obtain`` then finds it kept.

    Returns:
        What is wrong with it; empty when it was taken, or nothing is wanted of the folder. Whatever it is, the server may give another.

    Raises:
        Degraded: ``encryption_key_unusable``, ``not_enrolled``.
    """
    assert manifest.encryption is not None
    if not request.folder:
        return ""
    path = Path(request.state_dir) / "slots" / KEYS / f"{ids.bundle_digest(digest)}.json"
    holder = encryption_key.holder(request.identity, request.encryption_key)
    device = device_api.device_id(request)
    with contextlib.suppress(sealed.CannotOpen):
        kept = _kept(path)
        if kept is not None:
            _opened(kept, holder, device, digest, manifest.encryption.key_id)
            return ""
    try:
        with folder.UpdateFolder(request.folder).open(layout.carried_key(digest, ids.device_id(device))) as stream:
            data = stream.read(sealed.WRAPPED_MAX_BYTES + 1)
        if len(data) > sealed.WRAPPED_MAX_BYTES:
            raise ValueError(f"wanted at most {sealed.WRAPPED_MAX_BYTES} bytes")
        wrapped = sealed.decode_wrapped(json.loads(data))
        _opened(wrapped, holder, device, digest, manifest.encryption.key_id)
    except folder.Absent:
        return f"{request.folder} brings no content key for {device}: skerry export-update --device {device}"
    except (Rejected, sealed.CannotOpen, ContractError, ValueError, OSError, RecursionError) as error:
        return f"{request.folder}: the content key for {device} cannot be used: {error}"
    durable.make_folder(path.parent)
    durable.write(path, json.dumps(sealed.encode_wrapped(wrapped)).encode() + b"\n", mode=0o600)
    return ""


def _kept(path: Path) -> sealed.Wrapped | None:
    try:
        data = path.read_bytes()
        return sealed.decode_wrapped(json.loads(data)) if len(data) <= sealed.WRAPPED_MAX_BYTES else None
    except (FileNotFoundError, ValueError, ContractError):
        return None


def _opened(wrapped: sealed.Wrapped, holder: encryption_key.Holder, device: str, digest: str, key_id: str) -> bytes:
    try:
        secret = holder.secret(wrapped.point)
    except ValueError:
        raise sealed.CannotOpen("its point is not on the curve") from None
    key, about = sealed.wrapping_key(
        secret, sender=wrapped.point, receiver=holder.point(), device=device, digest=digest
    )
    found = sealed.unwrap(wrapped, key, about, AESGCM)
    if sealed.key_id(found) != key_id:
        raise sealed.CannotOpen("it is not the content key that the manifest names")
    return found


def _of_server(error: Rejected) -> Transient | Degraded | Rejected:
    if error.code in ("key_not_allowed", "not_found"):
        return Transient("key_not_given", error.detail)
    if error.code == "encryption_key_differs":
        advice = "an operator may say: skerry device forget-key; or erase the state and enrol anew"
        return Degraded("encryption_key_differs", error.detail, advice=advice)
    return error
