"""Content keys of encrypted bundles on the device: asked for once, kept wrapped, opened in a courier alone.

``slots/.keys/<digest>.json`` is what the server gave, over the network or in a folder that was carried here: a secret only for whoever has the device's encryption key besides. So a device that was
given a bundle once opens it ever after, without any network.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import ids, layout, sealed
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError

from skerry_agent import durable
from skerry_agent.courier import device_api, encryption_key, folder, requests
from skerry_agent.errors import Degraded, Rejected, Transient

KEYS = ".keys"
"""Below the folder of slots."""
_ONCE_MORE = ("bad_nonce", "bad_device_token")
"""A server that was restarted knows no nonce that it gave before; the answer has told its clock."""


def obtain(request: requests.Common, manifest: manifests.Manifest, digest: str) -> bytes:
    """The content key of an encrypted bundle: of what is kept here, else of the server.

    Raises:
        Transient: ``key_not_given``: the server does not give it now: its group has moved on, the key never came there, or what came
            is not the one that the manifest names. Whatever is said or sent here speaks of the sender, never of the bundle.
        Degraded: ``encryption_key_differs``, ``encryption_key_unusable``, ``not_enrolled``.
    """
    assert manifest.encryption is not None
    holder = encryption_key.holder(request.identity, request.encryption_key)
    device = device_api.device_id(request)
    path = _path(request, digest)
    found_here = _kept(path)
    if found_here is not None:
        try:
            return _opened(found_here, holder, device, digest, manifest.encryption.key_id)
        except sealed.CannotOpen:
            # Of an encryption key that was replaced, or damaged: a new one is asked for.
            pass
    answer = _ask(device_api.enrolled(request), digest, encryption_key.public_pem(holder))
    try:
        wrapped = sealed.decode_wrapped(answer.get("wrapped"))
        found = _opened(wrapped, holder, device, digest, manifest.encryption.key_id)
    except (ContractError, sealed.CannotOpen) as error:
        raise Transient("key_not_given", f"content key of {digest[:12]}: {error}") from None
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
    path = _path(request, digest)
    holder = encryption_key.holder(request.identity, request.encryption_key)
    device = device_api.device_id(request)
    with contextlib.suppress(sealed.CannotOpen):
        found_here = _kept(path)
        if found_here is not None:
            _opened(found_here, holder, device, digest, manifest.encryption.key_id)
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


def _ask(known: device_api.Enrolled, digest: str, pem: str) -> dict[str, Any]:
    for may_ask_again in (True, False):
        try:
            return known.api.content_key(known.key, known.device, digest, pem)
        except Rejected as error:
            if not (may_ask_again and error.code in _ONCE_MORE):
                raise _of_server(error) from None
    raise AssertionError("the second time returns or raises")


def kept(request: requests.Common, digest: str, key_id: str) -> bytes:
    """The content key of a bundle, of what is kept here alone; empty when it is not, or opens with this device's encryption key no more.

    Raises:
        Degraded: ``encryption_key_unusable``, ``not_enrolled``.
    """
    wrapped = _kept(_path(request, digest))
    if wrapped is None:
        return b""
    holder = encryption_key.holder(request.identity, request.encryption_key)
    try:
        return _opened(wrapped, holder, device_api.device_id(request), digest, key_id)
    except sealed.CannotOpen:
        return b""


def _path(request: requests.Common, digest: str) -> Path:
    return Path(request.state_dir) / "slots" / KEYS / f"{ids.bundle_digest(digest)}.json"


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


def _of_server(error: Rejected) -> Transient | Degraded:
    if error.code == "encryption_key_differs":
        advice = "an operator may say: skerry device forget-key; or erase the state and enrol anew"
        return Degraded("encryption_key_differs", error.detail, advice=advice)
    return Transient("key_not_given", f"{error.code}: {error.detail}")
