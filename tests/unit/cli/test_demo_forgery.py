"""What the demo's hostile mirror serves in place of the repository's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from skerry_cli.demo import forgery
from skerry_contract import layout
from skerry_contract import manifest as m


def file_of(data: bytes) -> m.File:
    return m.File(path="model.onnx", sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def test_no_delta_leads_around_a_flipped_byte(tmp_path: Path) -> None:
    repository, overlay = tmp_path / "repository", tmp_path / "mirror"
    before, after = file_of(b"a model of before"), file_of(b"the model")
    blob = repository / layout.blob(after.sha256)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"the model")

    place = forgery.flip_byte(repository, overlay, after, bases=[before])

    served = {str(path.relative_to(overlay)): path.read_bytes() for path in overlay.rglob("*") if path.is_file()}
    assert served.keys() == {layout.blob(after.sha256), layout.delta(before.sha256, after.sha256)}
    for data in served.values():
        assert [index for index in range(9) if data[index] != b"the model"[index]] == [place]
