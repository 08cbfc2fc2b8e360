"""The verb ``fetch``: the files of a bundle into staging, resumable at any byte.

Owns ``slots/.staging/<digest>/`` while it runs: finished files under their own names, ``.manifest.json`` from the first moment, so
that other bundles find what is here, and ``manifest.json`` last of all. The manifest's digest was verified by ``manifest``;
every file must have the size and the sha256 that it names, whatever the network, the cache on the way or the disk did.

Where a file comes from is its sources' matter (``acquiring``): here already, in another bundle, from a folder that was carried here (``folder``), of a delta (``patched``), over the
network (``resuming``, with what came in part in ``parts``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from skerry_contract import layout
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError

from skerry_agent import durable
from skerry_agent.courier import (
    acquiring,
    folder,
    locks,
    parts,
    patched,
    requests,
    resuming,
    room,
    shared,
    transport,
    watch,
)
from skerry_agent.courier.meter import Meter, Report
from skerry_agent.errors import Degraded, Rejected, Transient

_LOCK_WAIT_S = 20.0


def fetch(request: requests.Fetch, report: Report) -> dict[str, Any]:
    """Brings every file here. Called again after any interruption, it goes on where it was.

    Args:
        request: what to fetch.
        report: gets {file, done, size, total_done, total_size} in bytes, at most twice a second.

    Returns:
        ``bytes`` that came over the network in this run; ``files`` {source: how many files it had}; and what ``Patched.told`` says.

    Raises:
        Rejected: ``hash_mismatch`` and ``malformed_manifest`` of the manifest that was given, ``bad_request``.
        Transient: ``unreachable``, ``timeout``, ``busy``, ``blob_missing``, ``download_wasted``, ``mirror_wrong``, with what came so far kept.
        Degraded: ``not_enough_disk``, ``storage_failed``, ``not_enrolled``. Of an encrypted bundle as ``content_keys.obtain``.
    """
    manifest = _checked(request)
    slots = Path(request.state_dir) / "slots"
    staging = slots / ".staging" / request.digest
    wanted = {
        file.path: acquiring.Wanted(name=file.path, size=file.size, hashes={"sha256": file.sha256})
        for file in request.files
    }
    try:
        with (
            locks.alone_in(staging, _LOCK_WAIT_S),
            watch.Watch(request.limits.slow_s) as overdue,
        ):
            meter = Meter(report, overdue, max_bytes_s=request.max_kib_s * 1024, limits=request.limits)
            meter.begin(wanted.values())
            others = shared.OtherBundles(slots, request.digest, meter)
            web, url = _web(request), request.repository_url.rstrip("/")
            parsed = manifests.parse(manifest)
            key = b""
            if parsed.encryption is not None:
                # First: what this device cannot open it need not fetch.
                from skerry_agent.courier import content_keys

                complaint = content_keys.bring(request, parsed, request.digest)
                try:
                    key = content_keys.obtain(request, parsed, request.digest)
                except Transient as error:
                    error.detail += f"; {complaint}" if complaint else ""
                    raise
            deltas = patched.Patched(web, url, slots, request, meter, _lack_for(request, staging), key)
            whole = resuming.Resuming(
                web, lambda one: f"{url}/{layout.blob(one.hashes['sha256'])}", slots / ".parts", meter, request.limits,
                metered=request.metered,
            )  # fmt: skip
            carried = folder.Folder(folder.UpdateFolder(request.folder), slots / ".parts", meter)
            near: list[acquiring.Source] = [acquiring.Here(meter), shared.SameBundle(staging, wanted, meter), others]
            sources = [*near, *([carried] if request.folder else []), deltas, whole]
            parts.tidy(slots / ".parts", [one.key for one in wanted.values()])
            _check_room(request, staging, slots / ".parts", wanted, others)
            durable.write(staging / shared.STAGED_MANIFEST, manifest, mode=0o644)
            had: dict[str, int] = {}
            for path, one in wanted.items():
                try:
                    source = type(acquiring.bring(one, staging / path, sources)).__name__.lower()
                except Transient as error:
                    if carried.complaint:
                        error.detail += f"; {carried.complaint}"
                    raise
                had[source] = had.get(source, 0) + 1
                meter.finished(one)
            (staging / shared.STAGED_MANIFEST).replace(staging / manifests.MANIFEST_FILE)
            durable.sync_folder(staging)
            deltas.done()
            return {"bytes": meter.received, "files": had, **deltas.told()}
    except OSError as error:
        raise durable.disk_error(error) from error


def _web(request: requests.Fetch) -> transport.Web:
    ca_path = request.identity / "fleet-ca.pem"
    try:
        ca_pem = ca_path.read_text()
    except FileNotFoundError:
        raise Degraded("not_enrolled", f"{ca_path} is not there", advice="enrol the device") from None
    return transport.Web(server_url=request.server_url, ca_pem=ca_pem, now_s=request.now_s, gap_s=request.limits.gap_s)


def _lack_for(request: requests.Fetch, folder: Path) -> Callable[[int, int], str]:
    """What is missing for so many more files of so many bytes; empty when they fit."""
    reserve = {"reserve_bytes": request.reserve_bytes, "reserve_files": request.reserve_files}
    return lambda files, size_bytes: room.lack(folder, files=files, size_bytes=size_bytes, **reserve)


def _check_room(
    request: requests.Fetch,
    staging: Path,
    folder: Path,
    wanted: dict[str, acquiring.Wanted],
    others: shared.OtherBundles,
) -> None:
    """Room for what is not here in any form. Parts that nobody wants make way first."""
    here = parts.sizes(folder)
    # By content: what stands twice in the bundle comes once.
    at: dict[str, list[Path]] = {}
    for path, one in wanted.items():
        at.setdefault(one.key, []).append(staging / path)
    contents = {one.key: one for one in wanted.values()}
    lacking = [
        one
        for key, one in contents.items()
        if not others.has(one) and not any(path.is_file() and path.stat().st_size == one.size for path in at[key])
    ]
    to_come = sum(max(0, one.size - here.get(one.key, 0)) for one in lacking)

    def lack() -> str:
        return room.lack(
            staging,
            files=len(lacking),
            size_bytes=to_come,
            reserve_bytes=request.reserve_bytes,
            reserve_files=request.reserve_files,
        )

    if lack():
        parts.tidy(folder, [one.key for one in wanted.values()], keep=0)
        if said := lack():
            raise Degraded("not_enough_disk", said, advice="make room on the disk")


def _checked(request: requests.Fetch) -> bytes:
    """The manifest's bytes, when they are those of the digest and name every file that is asked for."""
    data = request.manifest.encode()
    if manifests.digest(data) != request.digest:
        raise Rejected("hash_mismatch", f"manifest: wanted digest {request.digest}, got {manifests.digest(data)}")
    try:
        named = {file.path: file for file in manifests.parse(data).files()}
    except ContractError as error:
        raise Rejected("malformed_manifest", str(error)) from None
    for file in request.files:
        # Whoever is equal to a file of a parsed manifest has a plain path and a digest.
        listed = named.get(file.path)
        if listed is None or (listed.sha256, listed.size) != (file.sha256, file.size):
            raise Rejected("bad_request", f"{file.path}: the manifest does not name it so")
    return data
