"""TUF on a device: ``safe_updater`` with the rules of Skerry's repository.

- A verified timestamp may only raise the reference time (``x-skerry-signed-at``); so does the bound that a former one left.
- The versions of the offline roles may not fall, even when the online key changed.

Not done here: target files on disk (documents are small and returned as bytes; blobs are ``download``'s), the device's own
floors, and deciding what to do about a failure.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from skerry_contract import layout
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.ngclient import FetcherInterface, UpdaterConfig

from skerry_agent.courier.safe_updater import SafeUpdater, utc
from skerry_agent.errors import Degraded

OFFLINE_ROLES = (Targets.type, layout.CATALOG_ROLE)
ROLES = (Root.type, Timestamp.type, Snapshot.type, Targets.type, layout.CATALOG_ROLE, layout.FLEET_ROLE)


class DeviceUpdater(SafeUpdater):
    """See the module. One ``refresh`` per instance.

    Args:
        folder: the cache; one process at a time.
        repository_url: the repository's root.
        bootstrap: bytes of the operator's root.
        now_s: wall clock, seconds since 1970.
        lower_bound_s, lower_bound_keys: see ``requests.Common``.
        age_s: so long after their date the online roles still count, seconds: for a repository that is carried here, where nobody can hold
            back newer ones. The offline roles and root never do.
    """

    held_roles = OFFLINE_ROLES

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
        age_s: float = 0.0,
    ) -> None:
        base = repository_url.rstrip("/")
        self._lower_bound_s = lower_bound_s
        self._lower_bound_keys = frozenset(lower_bound_keys)
        self._age = dt.timedelta(seconds=age_s)
        self._strict_time = utc(0)
        super().__init__(
            folder,
            f"{base}/{layout.METADATA_DIR}/",
            f"{base}/{layout.TARGETS_DIR}/",
            fetcher=fetcher,
            bootstrap=bootstrap,
            now_s=now_s,
            config=UpdaterConfig(targets_max_length=32 << 20, snapshot_max_length=1 << 20),
        )

    @property
    def signed_at(self) -> int:
        """When the timestamp was signed, seconds since 1970. Only after ``refresh``."""
        return _signed_at(self._trusted_set.timestamp)

    @property
    def online_keys(self) -> tuple[str, ...]:
        """Key ids that root names for the timestamp."""
        return tuple(self._trusted_set.root.roles[Timestamp.type].keyids)

    @property
    def signed_by(self) -> tuple[str, ...]:
        """Key ids whose signatures on the timestamp hold: whose word ``signed_at`` is. Only after ``refresh``."""
        held: Metadata[Timestamp] = Metadata.from_bytes(self._load_local_metadata(Timestamp.type))
        found = self._trusted_set.root.get_verification_result(Timestamp.type, held.signed_bytes, held.signatures)
        return tuple(found.signed)

    def versions(self) -> dict[str, int]:
        """The version of each role that was loaded and verified in this run."""
        return {role: self._trusted_set[role].version for role in ROLES if role in self._trusted_set}

    # --- overridden ---

    def _load_timestamp(self) -> None:
        trusted = self._trusted_set
        self._strict_time = now = trusted.reference_time
        age = dt.timedelta() if trusted.root.is_expired(now) else self._age
        trusted.reference_time = _before(now, age)
        try:
            super()._load_timestamp()
            self._strict_time = max(now, utc(_signed_at(trusted.timestamp)))
            trusted.reference_time = max(_before(now, age), utc(_signed_at(trusted.timestamp)))
            trusted._check_final_timestamp()
        except tuf_errors.ExpiredMetadataError as error:
            # What a refusal names is the time that it is, not the one that was judged by.
            trusted.reference_time = self._strict_time
            if not age:
                raise
            said = f"{error}, longer ago than the {age.total_seconds() / 86_400:g} days that a folder may be old"
            raise tuf_errors.ExpiredMetadataError(said) from error

    def _load_targets(self, role: str, parent_role: str) -> Targets:
        found = super()._load_targets(role, parent_role)
        if role in OFFLINE_ROLES and found.is_expired(self._strict_time):
            self._trusted_set.reference_time = self._strict_time
            raise tuf_errors.ExpiredMetadataError(f"New {role} is expired")
        return found

    def _reference_s(self) -> float:
        if not self._lower_bound_keys or self._lower_bound_keys & set(self.online_keys):
            return max(self._now_s, self._lower_bound_s)
        return self._now_s


def read_root(identity: Path) -> bytes:
    """The operator's root. Raises ``Degraded`` (``not_enrolled``)."""
    try:
        return (identity / "root.json").read_bytes()
    except OSError as error:
        raise Degraded("not_enrolled", f"{error}", advice="enrol the device") from None


def _before(now: dt.datetime, age: dt.timedelta) -> dt.datetime:
    # A clock at 1970 has nothing before it.
    return now - min(age, now - utc(0))


def _signed_at(timestamp: Timestamp) -> int:
    value = timestamp.unrecognized_fields.get(layout.SIGNED_AT_FIELD)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise tuf_errors.RepositoryError(f"timestamp: {layout.SIGNED_AT_FIELD}: wanted seconds since 1970")
    return value
