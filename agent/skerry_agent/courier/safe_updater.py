"""python-tuf's updater, made safe for power cuts, wrong clocks and many roots. Knows nothing of Skerry's own layout.

Owns the refresh of metadata, looking a target up, where its bytes lie, and what each failure is called. The trust anchor is
the root that is given at every start; what the cache holds is verified from there again. ``updater`` puts Skerry's rules on
top; the client of the public conformance suite (``tests/system/tuf_conformance_client``) runs this class as it is.

Differences from ``tuf.ngclient.Updater`` (a test guards the names and signatures that are overridden):

- Every file is synced, with its folder, before it counts; ``root.json`` never has a moment without a file.
- The reference time is given.
- Roots are followed to the newest, however many there are: tuf stops at 256 from the anchor, those of the cache included, so a
  device would stay behind for ever once the root has changed oftener than that.
- A refusal says what is missing: which root, and which time it is taken to be.
- Metadata in which an object names a key twice is refused: tuf would take the last, another reader the first.
- The versions of chosen roles may not fall, even when the online key changed and tuf forgets the old snapshot.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from skerry_contract import canonical
from skerry_contract.errors import Malformed
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from skerry_agent import durable
from skerry_agent.courier import transport
from skerry_agent.errors import AgentError, Rejected, Transient


class MemoryFetcher(FetcherInterface):
    """Takes metadata and documents into memory, no longer than tuf says they may be."""

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


class Fetcher(MemoryFetcher):
    """From the repository's server."""

    def __init__(self, web: transport.Connections) -> None:
        self._web = web

    def _fetch(self, url: str) -> Iterator[bytes]:
        with self._web.open("GET", url) as response:
            if transport.is_overloaded(response.status):
                raise transport.Overloaded(url, response)
            if response.status != 200:
                transport.read(
                    response, 1 << 20, url
                )  # leave the connection clean: a missing next root is the usual case
                raise tuf_errors.DownloadHTTPError(f"{url}: HTTP {response.status}", response.status)
            yield from transport.pieces(response, url)


class SafeUpdater(Updater):
    """See the module. One ``refresh`` per instance.

    Args:
        folder: the cache; one process at a time.
        metadata_url, targets_url: of the folders in the repository.
        bootstrap: bytes of the root that is trusted.
        now_s: wall clock, seconds since 1970.
    """

    held_roles: tuple[str, ...] = ()
    """Roles whose version may not fall while the keys that signed the newest seen are trusted."""

    def __init__(
        self,
        folder: Path,
        metadata_url: str,
        targets_url: str,
        *,
        fetcher: FetcherInterface,
        bootstrap: bytes,
        now_s: float,
        config: UpdaterConfig | None = None,
    ) -> None:
        durable.make_folder(folder / "root_history")
        self._now_s = now_s
        super().__init__(
            str(folder), metadata_url, target_base_url=targets_url, fetcher=fetcher, config=config, bootstrap=bootstrap
        )

    def target_url(self, info: TargetFile) -> str:
        """Where the repository keeps the bytes of a listed target."""
        folder, slash, name = info.path.rpartition("/")
        if self._trusted_set.root.consistent_snapshot:
            known = info.hashes
            name = f"{known.get('sha256') or next(iter(known.values()))}.{name}"
        return f"{self._target_base_url}{folder}{slash}{name}"

    def document(self, target_path: str, max_bytes: int) -> bytes | None:
        """The verified bytes of a target; None when no role lists it.

        Raises:
            What ``explain`` explains.
        """
        info = self.get_targetinfo(target_path)
        return None if info is None else self.fetch_target(info, max_bytes)

    def fetch_target(self, info: TargetFile, max_bytes: int) -> bytes:
        """The bytes of a listed target, verified. Raises as ``document``."""
        if "sha256" not in info.hashes or info.length > max_bytes:
            raise tuf_errors.LengthOrHashMismatchError(
                f"{info.path}: wanted a sha256 and at most {max_bytes} bytes, listed are {info.length}"
            )
        data = self._fetcher.download_bytes(self.target_url(info), info.length)
        info.verify_length_and_hashes(data)
        return data

    # --- overridden ---

    def refresh(self) -> None:
        """As tuf's, with refusals that say what is missing."""
        with self._dated():
            super().refresh()

    def get_targetinfo(self, target_path: str) -> TargetFile | None:
        """As tuf's, with refusals that say what is missing."""
        if Targets.type not in self._trusted_set:
            self.refresh()
        with self._dated():
            return super().get_targetinfo(target_path)

    def _load_root(self) -> None:
        while True:
            before = self._trusted_set.root.version
            super()._load_root()
            if self._trusted_set.root.version - before < self.config.max_root_rotations:
                break
        self._trusted_set.reference_time = utc(self._reference_s())

    def _load_timestamp(self) -> None:
        root = self._trusted_set.root
        newest = f"root version {root.version}, the newest that the repository offers after it,"
        if root.is_expired(self._trusted_set.reference_time):
            raise tuf_errors.ExpiredMetadataError(
                f"{newest} expired {root.expires:%Y-%m-%d}: {root.version + 1}.root.json is wanted, signed with the root keys"
            )
        try:
            super()._load_timestamp()
        except tuf_errors.UnsignedMetadataError as error:
            raise tuf_errors.UnsignedMetadataError(
                f"{error}; {newest} names other keys for it: should the keys have changed, {root.version + 1}.root.json is missing"
            ) from error

    def _load_targets(self, role: str, parent_role: str) -> Targets:
        held = self._held_version(role, parent_role) if role in self.held_roles else 0
        listed = self._trusted_set.snapshot.meta.get(f"{role}.json")
        if listed is not None and listed.version < held:
            # tuf asks this of the snapshot it remembers, and forgets that one when the online key changes.
            raise tuf_errors.BadVersionNumberError(f"{role}: version {listed.version} is offered, {held} was seen")
        return super()._load_targets(role, parent_role)

    def _download_metadata(self, rolename: str, length: int, version: int | None = None) -> bytes:
        data = super()._download_metadata(rolename, length, version)
        try:
            canonical.refuse_repeated_keys(data, what=rolename)
        except Malformed as error:
            raise tuf_errors.RepositoryError(str(error)) from None
        except ValueError:
            pass  # what is no JSON tuf refuses in its own words
        return data

    def _persist_file(self, filename: str, data: bytes) -> None:
        durable.write(Path(filename), data)

    def _update_root_symlink(self) -> None:
        version = self._trusted_set.root.version
        link, scratch = Path(self._dir, "root.json"), Path(self._dir, ".root.json.new")
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(Path("root_history", f"{version}.root.json"))
        scratch.replace(link)
        durable.sync_folder(Path(self._dir))

    # --- own ---

    def _reference_s(self) -> float:
        """What time it is taken to be once the newest root is known, seconds since 1970."""
        return self._now_s

    def _held_version(self, role: str, parent_role: str) -> int:
        """The version of a role in the cache, when the keys that are trusted now signed it; else 0."""
        try:
            held: Metadata[Any] = Metadata.from_bytes(self._load_local_metadata(role))
            delegator: Root | Targets = (
                self._trusted_set.root if parent_role == Root.type else self._trusted_set.targets
            )
            delegator.verify_delegate(role, held.signed_bytes, held.signatures)
        except (OSError, ValueError, tuf_errors.RepositoryError):
            return 0
        return int(held.signed.version)

    @contextlib.contextmanager
    def _dated(self) -> Iterator[None]:
        """Says with a refusal for age which time it was judged by: a wrong clock looks like an old repository."""
        try:
            yield
        except tuf_errors.ExpiredMetadataError as error:
            now = self._trusted_set.reference_time
            whose = "this device's clock" if now == utc(self._now_s) else "a signed timestamp"
            raise tuf_errors.ExpiredMetadataError(
                f"{error}; it is taken to be {now:%Y-%m-%d %H:%M} UTC, by {whose}"
            ) from error


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


def utc(seconds: float) -> dt.datetime:
    """A date of any number: a wall clock beyond year 9999 is as wrong as any, and stays one."""
    return dt.datetime.fromtimestamp(min(max(seconds, 0.0), 253402300799.0), dt.UTC)
