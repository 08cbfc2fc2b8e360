"""Which bundles make room on the disk for which: nothing that has its turn again, and nothing in vain."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from skerry_agent.core import effects as e
from skerry_agent.core import lifecycle as lc
from skerry_agent.errors import Rejected
from skerry_contract import manifest as m

from tests import models
from tests.unit.agent.test_attempts import Life

_Usage = collections.namedtuple("_Usage", "total used free")


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    (tmp_path / "state").mkdir()
    one = Life(tmp_path / "state")
    reserve_bytes = one.config.limits.disk_reserve_mb * 10**6
    # Nothing is free but what the reserve wants.
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: _Usage(10**12, 0, reserve_bytes))
    yield one
    one.store.close()


def slot(life: Life, version: str, *, model: str = "gas", padding: int = 0) -> str:
    folder = life.config.state_dir / f"{model}-{version}"
    digest = models.build_bundle(folder, model=model, version=version, padding=padding)
    folder.rename(life.slots.path(digest))
    return digest


def comes(life: Life, folder: Path, *, disk_mb: int) -> str:
    """Another model's first bundle is being admitted."""
    digest = models.build_bundle(folder, model="pump", seed=7)
    manifest = m.parse((folder / "manifest.json").read_bytes())
    variants = tuple(
        msgspec.structs.replace(one, needs=msgspec.structs.replace(one.needs, disk_mb=disk_mb))
        for one in manifest.variants
    )
    life.updating.fetching.manifest = msgspec.structs.replace(manifest, variants=variants)
    life.updating.update = lc.Update(
        state="fetch", model="pump", digest=digest, version="1.0.0", since=life.clock.instant()
    )
    return digest


def test_what_lies_ready_keeps_its_slot_when_what_it_made_way_for_does_not_fit(life: Life, tmp_path: Path) -> None:
    ready, failed = slot(life, "2.0.0", padding=3_000_000), slot(life, "1.9.0", padding=3_000_000)
    life.updating.turnover.parked = ready
    digest = comes(life, tmp_path / "pump", disk_mb=4)
    with pytest.raises(Rejected) as refused:
        life.updating.fetching.admit()
    assert refused.value.code == "not_enough_disk"
    assert set(life.slots.digests()) == {ready, failed}, "what goes must be enough, or nothing goes"
    # And it need not make way again before there is room.
    life.updating.update = lc.Update(state="ready", model="gas", digest=ready, version="2.0.0")
    assert life.updating.fetching.lacks_room(digest)
    assert not life.updating.fetching.lacks_room(failed), "nobody knows"
    slot(life, "1.8.0", padding=3_000_000)
    assert not life.updating.fetching.lacks_room(digest)


def test_what_waits_for_another_try_makes_room_where_that_is_enough(life: Life, tmp_path: Path) -> None:
    ready, _failed = slot(life, "2.0.0", padding=3_000_000), slot(life, "1.9.0", padding=3_000_000)
    life.updating.turnover.parked = ready
    comes(life, tmp_path / "pump", disk_mb=2)
    before = life.slots.spare({ready})[0]
    assert before > 3_000_000
    assert life.slots.spare({ready, *life.slots.digests()}) == (0, 0)
    with pytest.MonkeyPatch.context() as patch:
        free = life.config.limits.disk_reserve_mb * 10**6
        # What goes is free.
        patch.setattr(
            shutil, "disk_usage", lambda _path: _Usage(10**12, 0, free + before - life.slots.spare({ready})[0])
        )
        assert isinstance(life.updating.fetching.admit(), e.Admitted)
    assert life.slots.digests() == (ready,)
