"""The verbs ``enrol`` and ``renew``: how a device comes to its identity and keeps it.

Owns ``identity/``. The token says whom to believe: the fleet's CA by its fingerprint and the operator's root by its digest.
Nothing that the server answers can widen that. The order on disk is root, keys, certificates, and ``enrolled.json`` last: with it
the device counts as enrolled, without it the same errand may run again with the same key.

A root that is here stays: another enrolment may move the device to another server of the same operator, never to another
operator. To give a device away, its state is erased.
"""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from skerry_contract import enrolment, ids, layout
from skerry_contract.errors import ContractError

from skerry_agent import durable
from skerry_agent.courier import device_api, encryption_key, keys, locks, requests, transport
from skerry_agent.errors import Rejected, Transient

ROOT_MAX_BYTES = 512_000
CA_MAX_BYTES = 64 * 1024
_MOST_ROOTS = 64
_LOCK_WAIT_S = 20.0


def enrol(request: requests.Enrol) -> dict[str, Any]:
    """Makes this machine a device of the fleet that the token names.

    Returns:
        What ``enrolled.json`` holds: device_id, group, server_url, repository_url, mqtt {host, port}.

    Raises:
        Rejected: ``bad_token``; ``untrusted_server`` when the CA differs from the token's; ``untrusted_root`` when no root
            of the repository is the token's, or another root is here; ``malformed_answer``; the server's own refusals.
        Transient: ``unreachable``, ``timeout``, ``busy``.
    """
    try:
        token = enrolment.parse(request.token)
        asked = str(ids.device_id(request.csr_subject)) if request.csr_subject else ""
    except ContractError as error:
        raise Rejected("bad_token", str(error)) from None
    identity = request.identity
    try:
        with locks.alone(Path(request.state_dir) / "run" / "enrol.lock", _LOCK_WAIT_S):
            durable.make_folder(identity)
            # Told before anything is asked of the network, and before the token is used up.
            held = _held_root(identity, token.root_sha256)
            ca_pem = _find_ca(token, request)
            web = transport.Web(
                server_url=token.server_url, ca_pem=ca_pem, now_s=request.now_s, gap_s=request.limits.gap_s
            )
            if held is None:
                durable.write(identity / "root.json", _find_root(token, web), mode=0o644)
            key = keys.make_key(identity)
            api = device_api.DeviceApi(web, token.server_url, request.now_s)
            other = encryption_key.public_pem(encryption_key.holder(identity, request.encryption_key))
            answer = api.enrol(token.token, keys.request_certificate(key, asked), asked, other)
            enrolled = _checked(answer, token, key, ca_pem)
            durable.write(identity / "fleet-ca.pem", ca_pem.encode(), mode=0o644)
            durable.write(identity / keys.CERTIFICATE_FILE, answer["certificate"].encode(), mode=0o644)
            durable.write(identity / "enrolled.json", json.dumps(enrolled, indent=2).encode() + b"\n", mode=0o644)
    except OSError as error:
        raise durable.disk_error(error) from error
    return enrolled


def renew(request: requests.Renew) -> dict[str, Any]:
    """A new certificate for the key that is here, before the old one ends.

    Returns:
        ``expires_s``: end of the new certificate, seconds since 1970; ``renew_at_s``: two thirds of its life.

    Raises:
        Degraded: ``not_enrolled``, ``identity_damaged``.
        Rejected: ``malformed_answer`` for a certificate of another key or device; the server's own refusals.
        Transient: ``unreachable``, ``timeout``.
    """
    identity = request.identity
    known = device_api.enrolled(request)
    key, device, ca_pem = known.key, known.device, known.ca_pem
    answer = known.api.renew(key, device, keys.request_certificate(key, device))
    certificate = _checked_certificate(answer, key, ca_pem, device)
    try:
        durable.write(identity / keys.CERTIFICATE_FILE, answer["certificate"].encode(), mode=0o644)
    except OSError as error:
        raise durable.disk_error(error) from error
    begins, ends = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return {"expires_s": int(ends), "renew_at_s": begins + (ends - begins) * 2 / 3}


def _held_root(identity: Path, wanted_sha256: str) -> bytes | None:
    try:
        held = (identity / "root.json").read_bytes()
    except FileNotFoundError:
        return None
    got = hashlib.sha256(held).hexdigest()
    if got != wanted_sha256:
        raise Rejected(
            "untrusted_root",
            f"this device trusts the root {got}, the token names {wanted_sha256}",
            advice="take a token of the same operator, or erase the device's state to give it away",
        )
    return held


def _find_root(token: enrolment.Enrolment, web: transport.Web) -> bytes:
    """The root with the token's digest: version 1, or the version that the operator's tool held."""
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    seen: list[str] = []
    for version in range(1, _MOST_ROOTS + 1):
        url = f"{token.server_url}/repository/{layout.METADATA_DIR}/{version}.{Root.type}.json"
        status, data = web.get(url, max_bytes=ROOT_MAX_BYTES)
        if status == 404 and seen:
            break
        if status != 200:
            raise Transient("unreachable", f"{url}: HTTP {status}")
        seen.append(hashlib.sha256(data).hexdigest())
        if seen[-1] == token.root_sha256:
            try:
                root = Metadata[Root].from_bytes(data)
                root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
            except (RepositoryError, AttributeError) as error:
                raise Rejected("untrusted_root", f"{url}: it has the token's digest and is no root: {error}") from None
            return data
    raise Rejected(
        "untrusted_root", f"the repository's roots are {', '.join(seen)}, the token names {token.root_sha256}"
    )


def _find_ca(token: enrolment.Enrolment, request: requests.Enrol) -> str:
    """The CA certificate with the token's fingerprint, from a server that nobody trusts yet.

    It may stand in the chain that the server shows, or at ``/device/v1/ca``. What comes back is believed for its digest
    alone, and nothing else is sent or read on these connections.
    """
    parts = urlsplit(token.server_url)
    host, port = str(parts.hostname), parts.port or 443
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    found = b""
    try:
        with (
            socket.create_connection((host, port), timeout=request.limits.gap_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            target = f"{device_api.BASE}/ca"
            secured.sendall(f"GET {target} HTTP/1.0\r\nHost: {host}:{port}\r\nAccept: */*\r\n\r\n".encode())
            while len(found) <= CA_MAX_BYTES and (piece := secured.recv(8192)):
                found += piece
    except TimeoutError as error:
        raise Transient("timeout", f"{token.server_url}: {error}") from error
    except OSError as error:
        raise Transient("unreachable", f"{token.server_url}: {error}") from error
    head, _, body = found.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise Transient("unreachable", f"{token.server_url}{target}: wanted the fleet's CA, got {head[:80]!r}")
    for certificate in _certificates(body):
        if certificate.fingerprint(hashes.SHA256()).hex() == token.ca_sha256:
            return certificate.public_bytes(serialization.Encoding.PEM).decode()
    raise Rejected("untrusted_server", f"{token.server_url} shows no CA with the fingerprint {token.ca_sha256}")


def _certificates(pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        return []


def _checked(
    answer: dict[str, Any], token: enrolment.Enrolment, key: ec.EllipticCurvePrivateKey, ca_pem: str
) -> dict[str, Any]:
    """What to remember of the server's answer, with every part of it checked."""
    try:
        device, group = ids.device_id(answer.get("device_id")), ids.group_name(answer.get("group"))
        mqtt = answer["mqtt"]
        host, port = str(mqtt["host"]), int(mqtt["port"])
        repository_url = str(answer.get("repository_url") or f"{token.server_url}/repository")
        if urlsplit(repository_url).scheme != "https" or not host or not 0 < port < 1 << 16:
            raise ValueError(f"repository_url {repository_url[:200]!r}, mqtt {host[:200]!r} port {port}")
    except (ContractError, KeyError, TypeError, ValueError) as error:
        raise Rejected("malformed_answer", f"enrol: {error}") from None
    _checked_certificate(answer, key, ca_pem, device)
    return {
        "device_id": device,
        "group": group,
        "server_url": token.server_url,
        "repository_url": repository_url.rstrip("/"),
        "mqtt": {"host": host, "port": port},
    }


def _checked_certificate(
    answer: dict[str, Any], key: ec.EllipticCurvePrivateKey, ca_pem: str, device: str
) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificates(str(answer["certificate"]).encode())[0]
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem.encode()))
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (KeyError, ValueError, TypeError, IndexError, InvalidSignature) as error:
        raise Rejected("malformed_answer", f"certificate: {type(error).__name__} {error}") from None
    if certificate.public_key() != key.public_key() or [name.value for name in names] != [device]:
        raise Rejected("malformed_answer", f"certificate: wanted one of this device's key for {device}")
    return certificate
