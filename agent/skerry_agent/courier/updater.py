"""TUF on a device: python-tuf's updater, made safe for power cuts, wrong clocks and repositories restored from a backup.

Owns the refresh of metadata, looking a target up and fetching its bytes, and what each failure is called. The trust anchor
is the operator's ``identity/root.json`` at every start; what the cache holds is verified from there again.

Differences from ``tuf.ngclient.Updater`` (a test guards the names and signatures that are overridden):

- Every file is synced, with its folder, before it counts; ``root.json`` never has a moment without a file.
- The reference time is given, and a verified timestamp may only raise it (``x-skerry-signed-at``).
- The versions of the offline roles may not fall, even when the online key changed and tuf forgets the old snapshot.

Not done here: target files on disk (documents are small and returned as bytes; blobs are ``download``'s), the device's own
floors, and deciding what to do about a failure.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from skerry_contract import layout
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from skerry_agent.courier import durable, transport
from skerry_agent.errors import AgentError, Degraded, Rejected, Transient

OFFLINE_ROLES = (Targets.type, layout.CATALOG_ROLE)
ROLES = (Root.type, Timestamp.type, Snapshot.type, Targets.type, layout.CATALOG_ROLE, layout.FLEET_ROLE)


class Fetcher(FetcherInterface):
    """Fetches metadata and documents into memory, no longer than tuf says they may be."""

    def __init__(self, web: transport.Web) -> None:
        self._web = web

    def _fetch(self, url: str) -> Iterator[bytes]:
        with self._web.open("GET", url) as response:
            if response.status != 200:
                transport.read(
                    response, 1 << 20, url
                )  # leave the connection clean: a missing next root is the usual case
                raise tuf_errors.DownloadHTTPError(f"{url}: HTTP {response.status}", response.status)
            yield from transport.pieces(response, url)

    @contextlib.contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """As the interface says; the base class would copy through a temporary file, often on a small tmpfs."""
        data = io.BytesIO()
        for piece in self._fetch(url):
            data.write(piece)
            if data.tell() > max_length:
                raise tuf_errors.DownloadLengthMismatchError(f"{url}: more than {max_length} bytes")
        data.seek(0)
        yield data


class DeviceUpdater(Updater):
    """See the module. One ``refresh`` per instance.

    Args:
        folder: the cache; one process at a time.
        repository_url: the repository's root.
        bootstrap: bytes of the operator's root.
        now_s: wall clock, seconds since 1970.
        lower_bound_s, lower_bound_keys: see ``requests.Common``.
    """

    def __init__(
        self,
        folder: Path,
        repository_url: str,
        *,
        fetcher: FetcherInterface,
        bootstrap: bytes,
        now_s: float,
        lower_bound_s: float = 0.0,
        lower_bound_keys: tuple[str, ...] = (),
    ) -> None:
        durable.make_folder(folder)
        base = repository_url.rstrip("/")
        self._now_s = now_s
        self._lower_bound_s = lower_bound_s
        self._lower_bound_keys = frozenset(lower_bound_keys)
        super().__init__(
            str(folder),
            f"{base}/{layout.METADATA_DIR}/",
            target_base_url=f"{base}/{layout.TARGETS_DIR}/",
            fetcher=fetcher,
            config=UpdaterConfig(targets_max_length=32 << 20, snapshot_max_length=1 << 20),
            bootstrap=bootstrap,
        )

    @property
    def signed_at(self) -> int:
        """When the timestamp was signed, seconds since 1970. Only after ``refresh``."""
        return _signed_at(self._trusted_set.timestamp)

    @property
    def online_keys(self) -> tuple[str, ...]:
        """Key ids that root names for the timestamp: whose word ``signed_at`` is."""
        return tuple(self._trusted_set.root.roles[Timestamp.type].keyids)

    def versions(self) -> dict[str, int]:
        """The version of each role that was loaded and verified in this run."""
        return {role: self._trusted_set[role].version for role in ROLES if role in self._trusted_set}

    def document(self, target_path: str, max_bytes: int) -> bytes | None:
        """The verified bytes of a target; None when no role lists it.

        Raises:
            What ``explain`` explains.
        """
        info = self.get_targetinfo(target_path)
        return None if info is None else self.fetch_target(info, max_bytes)

    def fetch_target(self, info: TargetFile, max_bytes: int) -> bytes:
        """The bytes of a listed target, verified. Raises as ``document``."""
        sha256 = info.hashes.get("sha256")
        if sha256 is None or info.length > max_bytes:
            raise tuf_errors.LengthOrHashMismatchError(
                f"{info.path}: wanted a sha256 and at most {max_bytes} bytes, listed are {info.length}"
            )
        folder, _, name = info.path.rpartition("/")
        url = f"{self._target_base_url}{folder}/{sha256}.{name}"
        data = self._fetcher.download_bytes(url, info.length)
        info.verify_length_and_hashes(data)
        return data

    # --- overridden ---

    def _load_root(self) -> None:
        super()._load_root()
        reference_s = self._now_s
        if not self._lower_bound_keys or self._lower_bound_keys & set(self.online_keys):
            reference_s = max(reference_s, self._lower_bound_s)
        self._trusted_set.reference_time = _utc(reference_s)

    def _load_timestamp(self) -> None:
        super()._load_timestamp()
        signed_at = _utc(_signed_at(self._trusted_set.timestamp))
        self._trusted_set.reference_time = max(self._trusted_set.reference_time, signed_at)
        self._trusted_set._check_final_timestamp()

    def _load_targets(self, role: str, parent_role: str) -> Targets:
        held = self._held_version(role, parent_role) if role in OFFLINE_ROLES else 0
        listed = self._trusted_set.snapshot.meta.get(f"{role}.json")
        if listed is not None and listed.version < held:
            # tuf asks this of the snapshot it remembers, and forgets that one when the online key changes.
            raise tuf_errors.BadVersionNumberError(f"{role}: version {listed.version} is offered, {held} was seen")
        return super()._load_targets(role, parent_role)

    def _persist_file(self, filename: str, data: bytes) -> None:
        durable.write(Path(filename), data)

    def _update_root_symlink(self) -> None:
        version = self._trusted_set.root.version
        link, scratch = Path(self._dir, "root.json"), Path(self._dir, ".root.json.new")
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(Path("root_history", f"{version}.root.json"))
        scratch.replace(link)
        durable.sync_folder(Path(self._dir))

    def _held_version(self, role: str, parent_role: str) -> int:
        """The version of an offline role in the cache, when the keys that are trusted now signed it; else 0."""
        try:
            held: Metadata[Any] = Metadata.from_bytes(self._load_local_metadata(role))
            delegator: Root | Targets = (
                self._trusted_set.root if parent_role == Root.type else self._trusted_set.targets
            )
            delegator.verify_delegate(role, held.signed_bytes, held.signatures)
        except (OSError, ValueError, tuf_errors.RepositoryError):
            return 0
        return int(held.signed.version)


def explain(error: BaseException) -> AgentError | None:
    """What a failure of the updater means to the supervisor; None for one that is no failure of the peer or the disk."""
    seen: BaseException | None = error
    while seen is not None:
        # The transport's own words, which tuf wrapped.
        if isinstance(seen, AgentError):
            return seen
        seen = seen.__cause__
    kinds: tuple[tuple[type[Exception], type[AgentError], str], ...] = (
        (tuf_errors.SlowRetrievalError, Transient, "timeout"),
        (tuf_errors.DownloadLengthMismatchError, Rejected, "size_mismatch"),
        (tuf_errors.DownloadError, Transient, "unreachable"),
        (tuf_errors.UnsignedMetadataError, Rejected, "bad_signature"),
        (tuf_errors.ExpiredMetadataError, Rejected, "expired"),
        (tuf_errors.BadVersionNumberError, Rejected, "rollback"),
        (tuf_errors.LengthOrHashMismatchError, Rejected, "hash_mismatch"),
        (tuf_errors.RepositoryError, Rejected, "malformed_metadata"),
    )
    for kind, meaning, code in kinds:
        if isinstance(error, kind):
            return meaning(code, str(error) or type(error).__name__)
    if isinstance(error, RecursionError):
        return Rejected("malformed_metadata", "nested too deep")
    if isinstance(error, OSError):
        return durable.disk_error(error)
    return None


def read_root(identity: Path) -> bytes:
    """The operator's root. Raises ``Degraded`` (``not_enrolled``)."""
    try:
        return (identity / "root.json").read_bytes()
    except OSError as error:
        raise Degraded("not_enrolled", f"{error}", advice="enrol the device") from None


def _signed_at(timestamp: Timestamp) -> int:
    value = timestamp.unrecognized_fields.get(layout.SIGNED_AT_FIELD)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise tuf_errors.RepositoryError(f"timestamp: {layout.SIGNED_AT_FIELD}: wanted seconds since 1970")
    return value


def _utc(seconds: float) -> dt.datetime:
    # A wall clock beyond year 9999 is as wrong as any: keep it a date.
    return dt.datetime.fromtimestamp(min(max(seconds, 0.0), 253402300799.0), dt.UTC)
