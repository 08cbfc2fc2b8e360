"""The names inside tuf that our updaters override or read. An upgrade that changes one must fail here, not on a device."""

import datetime as dt
import inspect

import pytest
from skerry_agent.courier import safe_updater
from skerry_agent.errors import Degraded, Rejected, Transient
from skerry_cli import verified_catalog
from tuf.api import exceptions as e
from tuf.ngclient import FetcherInterface, Updater
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

OVERRIDDEN = {
    "_load_root": "(self) -> None",
    "_load_timestamp": "(self) -> None",
    "_load_targets": "(self, role: str, parent_role: str) -> tuf.api._payload.Targets",
    "_download_metadata": "(self, rolename: str, length: int, version: int | None = None) -> bytes",
    "_persist_file": "(self, filename: str, data: bytes) -> None",
    "_update_root_symlink": "(self) -> None",
}


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_overridden_methods_still_exist_with_their_signatures(name):
    wanted = OVERRIDDEN[name].replace("tuf.api._payload.", "")
    assert str(inspect.signature(getattr(Updater, name))).replace("'", "") == wanted
    assert name in vars(safe_updater.SafeUpdater)


def test_refresh_still_goes_through_every_overridden_step():
    source = inspect.getsource(Updater.refresh)
    for step in ("self._load_root()", "self._load_timestamp()", "self._load_snapshot()", "self._load_targets("):
        assert step in source
    for method in (Updater._persist_metadata, Updater._persist_root):
        assert "self._persist_file(" in inspect.getsource(method)
    assert "self._load_targets(" in inspect.getsource(Updater._preorder_depth_first_walk)


def test_the_trusted_set_still_judges_by_its_reference_time():
    source = inspect.getsource(TrustedMetadataSet)
    assert "self.reference_time = datetime.datetime.now(datetime.timezone.utc)" in source
    assert source.count("is_expired(") == source.count("is_expired(self.reference_time)")
    assert str(inspect.signature(TrustedMetadataSet._check_final_timestamp)) == "(self) -> 'None'"


def test_names_that_are_read_inside_tuf_still_exist():
    source = inspect.getsource(Updater)
    for name in (
        "self._trusted_set",
        "self._dir",
        "self._fetcher",
        "self._target_base_url",
        "self._load_local_metadata",
    ):
        assert name in source
    assert hasattr(FetcherInterface, "download_file")
    assert "_load_targets" in vars(Updater)
    assert issubclass(verified_catalog.CatalogUpdater, Updater)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (e.UnsignedMetadataError("x"), Rejected, "bad_signature"),
        (e.ExpiredMetadataError("x"), Rejected, "expired"),
        (e.BadVersionNumberError("x"), Rejected, "rollback"),
        (e.LengthOrHashMismatchError("x"), Rejected, "hash_mismatch"),
        (e.RepositoryError("x"), Rejected, "malformed_metadata"),
        (RecursionError(), Rejected, "malformed_metadata"),
        (e.DownloadLengthMismatchError("x"), Rejected, "size_mismatch"),
        (e.DownloadHTTPError("x", 500), Transient, "unreachable"),
        (e.SlowRetrievalError("x"), Transient, "timeout"),
        (OSError(28, "No space left on device"), Degraded, "not_enough_disk"),
        (OSError(5, "Input/output error"), Degraded, "storage_failed"),
    ],
)
def test_failures_have_stable_codes(error, kind, code):
    explained = safe_updater.explain(error)
    assert (type(explained), explained.code) == (kind, code)


def test_a_bug_is_not_explained_away():
    assert safe_updater.explain(KeyError("x")) is None


def test_what_the_transport_said_survives_being_wrapped():
    wrapped = e.DownloadError("wrapped")
    wrapped.__cause__ = Transient("timeout", "slow")
    assert safe_updater.explain(wrapped).code == "timeout"


@pytest.mark.parametrize("seconds", [-1e12, 0, 1e9, 1e18])
def test_any_wall_clock_is_a_date(seconds):
    assert isinstance(safe_updater.utc(seconds), dt.datetime)
