"""The verbs ``sync`` and ``manifest``: what should this device run, and is it approved?

Owns the order of the questions. The answers are verified here as far as signatures go; floors, windows and whether the
bundle fits this device are the supervisor's.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

from skerry_contract import canonical, floors, group, ids, layout
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError
from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.ngclient import FetcherInterface

from skerry_agent.courier import folder, folder_fetcher, locks, requests, safe_updater, transport, updater
from skerry_agent.errors import AgentError, Degraded, Rejected, Transient

_LOCK_WAIT_S = 20.0
_OF_THE_MIRROR = frozenset({"hash_mismatch", "size_mismatch", "malformed_metadata"})
"""What says nothing of the bundle whose manifest is wanted: signed is what it must be, and another came."""
_MAX_PAUSE_S = 30.0


def sync(request: requests.Sync, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Refreshes the metadata and reads the group document and the floors.

    With ``folder`` all of it comes from there, and nobody is asked for the membership.

    An expired or missing catalog does not fail the errand: the group document may still send the device back to what it has
    confirmed. Then ``floors`` is None and ``catalog_error`` says why.

    Args:
        report: gets {membership, self_error} before the repository is asked: what the server said counts though the metadata cannot be
            refreshed, and an operator's order arrives just then.

    Returns:
        ``tuf`` {role: version}, ``signed_at`` with ``signed_by`` whose word it is, ``online_keys`` that root names for it, ``group``, ``group_document`` (canonical
        JSON text, None when the group has none), ``floors`` and ``forced``, ``catalog_error`` {code, detail} or None, ``membership`` (None
        when the server could not be asked, then ``self_error`` {kind, code, detail}), ``renew_at_s`` and ``ends_s`` (when two
        thirds of the certificate's life are over, 0 for at once, and when it ends, seconds since 1970; None when it cannot be read).

    Raises:
        AgentError: what keeps the device from knowing its group document.
    """
    try:
        name = ids.group_name(request.group)
    except ContractError as error:
        raise Rejected("bad_request", str(error)) from None
    web = _web(request)
    with locks.alone(request.tuf / "lock", _LOCK_WAIT_S):
        membership, self_error, told_s = (None, None, 0.0) if request.folder else _membership(request, web)
        if not request.folder:
            report({"membership": membership, "self_error": self_error})
        if membership is not None:
            name = membership["group"]
        fresh = _open_folder(request) if request.folder else _open(request, web)
        refreshed = False
        try:
            fresh.refresh()
            refreshed = True
            document = fresh.document(layout.group_target(name), group.MAX_BYTES)
        except Exception as error:
            raise _told_of_folder(_named(error), request.folder, name if refreshed else "") from error
        if document is not None:
            _check_group(document, name)
        found, forced, catalog_error = _floors(fresh)
    return {
        "tuf": fresh.versions(),
        "signed_at": fresh.signed_at,
        "online_keys": list(fresh.online_keys),
        "signed_by": list(fresh.signed_by),
        "group": name,
        "group_document": None if document is None else document.decode(),
        "floors": found,
        "forced": forced,
        "catalog_error": catalog_error,
        "membership": membership,
        "self_error": self_error,
        **_certificate(request, told_s),
    }


def manifest(request: requests.Manifest) -> dict[str, Any]:
    """The manifest of a bundle that the approvers signed for, as text under ``manifest``.

    Raises:
        AgentError: ``not_in_catalog`` when the catalog does not list this version, or lists it as another digest;
            ``malformed_manifest``; ``mirror_wrong`` for what is not as it was signed, after a few tries with pauses; and every other
            code of ``safe_updater.explain``.
    """
    try:
        digest = ids.bundle_digest(request.digest)
        target = layout.manifest_target(ids.model_name(request.model), request.version)
    except ContractError as error:
        raise Rejected("bad_request", str(error)) from None
    if not request.folder:
        return _manifest_of_mirror(request, digest, target)
    try:
        return _manifest(request, digest, target, lambda: _open_folder(request))
    except AgentError as refused:
        # The repository may be further on than what was carried here.
        try:
            return _manifest_of_mirror(request, digest, target)
        except AgentError as error:
            error.detail += f"; {request.folder}: {refused.code}: {refused.detail}"
            raise


def _manifest_of_mirror(request: requests.Manifest, digest: str, target: str) -> dict[str, Any]:
    """From the repository. An error page with status 200 is gone a moment later: asked again with pauses before anything is said of it."""
    for attempt in range(1, request.limits.idle_attempts + 1):
        try:
            return _manifest(request, digest, target, lambda: _open(request, _web(request)))
        except transport.MirrorWrong as error:
            wrong = error
        except Rejected as error:
            if error.code not in _OF_THE_MIRROR:
                raise
            wrong = transport.MirrorWrong(f"{error.code}: {error.detail}")
        if attempt < request.limits.idle_attempts:
            time.sleep(random.uniform(0, min(_MAX_PAUSE_S, request.limits.pause_s * 2**attempt)))
    raise wrong


def _manifest(
    request: requests.Manifest, digest: str, target: str, opened: Callable[[], updater.DeviceUpdater]
) -> dict[str, Any]:
    wanted = f"{request.model}@{request.version}"
    with locks.alone(request.tuf / "lock", _LOCK_WAIT_S):
        fresh = opened()
        try:
            fresh.refresh()
            info = fresh.get_targetinfo(target)
            if info is None:
                raise Rejected("not_in_catalog", f"{wanted}: the catalog does not list it")
            if info.hashes.get("sha256") != digest:
                listed = info.hashes.get("sha256")
                raise Rejected("not_in_catalog", f"{wanted}: the catalog lists it as {listed}, not as {digest}")
            if info.length > manifests.MAX_BYTES:
                # Signed so: no mirror's fault, and not asked for.
                listed = f"the catalog lists {info.length} bytes, wanted at most {manifests.MAX_BYTES}"
                raise Rejected("malformed_manifest", f"{wanted}: {listed}")
            data = fresh.fetch_target(info, manifests.MAX_BYTES)
            # What the signed length and hash vouch for is the digest that was asked for. Believing it twice costs nothing.
            if canonical.sha256(data) != digest:
                raise LengthOrHashMismatchError(f"{wanted}: the manifest is not of digest {digest}")
        except Exception as error:
            raise _named(error) from error
    try:
        parsed = manifests.parse(data)
    except ContractError as error:
        raise Rejected("malformed_manifest", f"{wanted}: {error}") from None
    if (parsed.model, parsed.version) != (request.model, request.version):
        raise Rejected("malformed_manifest", f"{wanted}: the manifest is of {parsed.model}@{parsed.version}")
    return {"manifest": data.decode(), "tuf": fresh.versions(), "signed_at": fresh.signed_at}


def _web(request: requests.Common) -> transport.Web:
    path = request.identity / "fleet-ca.pem"
    try:
        ca_pem = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Degraded("not_enrolled", f"{path}: {error}", advice="enrol the device") from None
    return transport.Web(server_url=request.server_url, ca_pem=ca_pem, now_s=request.now_s, gap_s=request.limits.gap_s)


def _open(request: requests.Common, web: transport.Web) -> updater.DeviceUpdater:
    return _updater(request, request.repository_url, safe_updater.Fetcher(web))


def _open_folder(request: requests.Common) -> updater.DeviceUpdater:
    return _updater(
        request, folder_fetcher.URL, folder_fetcher.Fetcher(folder.UpdateFolder(request.folder)), age_s=request.age_s
    )


def _updater(
    request: requests.Common, url: str, fetcher: FetcherInterface, *, age_s: float = 0.0
) -> updater.DeviceUpdater:
    root = updater.read_root(request.identity)
    try:
        return updater.DeviceUpdater(
            request.tuf,
            url,
            fetcher=fetcher,
            bootstrap=root,
            now_s=request.now_s,
            lower_bound_s=request.lower_bound_s,
            lower_bound_keys=request.lower_bound_keys,
            age_s=age_s,
        )
    except Exception as error:
        raise _named(error) from error


def _named(error: Exception) -> Exception:
    return safe_updater.explain(error) or error


def _told_of_folder(error: Exception, folder: str, group_name: str) -> Exception:
    """What a folder lacks, as whoever carried it here can mend it. ``group_name``: of the device, once the folder's metadata held."""
    if folder and isinstance(error, AgentError):
        if error.code == "rollback":
            error.detail = f"{folder} is older than what this device has seen: export the update anew ({error.detail})"
        elif error.code == "folder_incomplete" and group_name:
            error.detail = (
                f"{folder} brings nothing for this device's group: export it with --group {group_name} ({error.detail})"
            )
    return error


def _membership(
    request: requests.Sync, web: transport.Web
) -> tuple[dict[str, Any] | None, dict[str, str] | None, float]:
    """What the server says of this device, and of the time. Its silence must not keep the device from its group document."""
    from skerry_agent.courier import device_api, keys

    api = device_api.DeviceApi(web, request.server_url, request.now_s)
    try:
        enrolled = json.loads((request.identity / "enrolled.json").read_bytes())
        key = keys.load_key(request.identity)
        answer = api.membership(key, str(enrolled["device_id"]))
        membership = {
            "group": ids.group_name(answer.get("group")),
            "tags": {str(k): str(v) for k, v in dict(answer.get("tags") or {}).items()},
            "version": int(answer.get("version", 0)),
            # Of an older server: nothing.
            "logs": int(answer.get("logs") or 0),
            "orders": {str(kind): int(number) for kind, number in dict(answer.get("orders") or {}).items()},
            "alone": answer.get("alone") is True,
        }
    except AgentError as error:
        return None, {"kind": type(error).__name__.lower(), "code": error.code, "detail": error.detail}, api.told_s
    except (OSError, ValueError, KeyError, TypeError, ContractError) as error:
        fault = {"kind": "rejected", "code": "malformed_answer", "detail": f"{type(error).__name__}: {error}"}
        return None, fault, api.told_s
    return membership, None, api.told_s


def _certificate(request: requests.Common, told_s: float) -> dict[str, float | None]:
    from cryptography import x509

    from skerry_agent.courier import keys

    try:
        certificate = x509.load_pem_x509_certificate((request.identity / keys.CERTIFICATE_FILE).read_bytes())
    except (OSError, ValueError):
        return {"renew_at_s": None, "ends_s": None}
    begins, ends = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    # Made while the server's clock ran ahead: it is right again, and its broker takes nobody whose certificate has not begun.
    unbegun = 0.0 < told_s < begins
    return {"renew_at_s": 0.0 if unbegun else begins + (ends - begins) * 2 / 3, "ends_s": ends}


def _check_group(document: bytes, name: str) -> None:
    try:
        parsed = group.parse(document)
    except ContractError as error:
        raise Rejected(getattr(error, "code", "malformed"), f"group {name}: {error}") from None
    if parsed.group != name:
        raise Rejected("malformed", f"group {name}: the document is of group {parsed.group}")


def _floors(fresh: updater.DeviceUpdater) -> tuple[dict[str, str] | None, dict[str, str] | None, dict[str, str] | None]:
    try:
        data = fresh.document(layout.FLOORS_TARGET, floors.MAX_BYTES)
        if data is None:
            return None, None, {"code": "not_in_catalog", "detail": f"the catalog does not list {layout.FLOORS_TARGET}"}
        return floors.parse(data), floors.parse_forced(data), None
    except ContractError as error:
        return None, None, {"code": error.code, "detail": str(error)}
    except Exception as error:
        explained = safe_updater.explain(error)
        if explained is None or isinstance(explained, Degraded):
            raise
        # Not being reached is a failure of the errand: the next try may bring the floors.
        if isinstance(explained, Transient):
            raise explained from error
        return None, None, {"code": explained.code, "detail": explained.detail}
