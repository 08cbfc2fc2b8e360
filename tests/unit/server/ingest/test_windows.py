"""What ingest reads in one pass is what the contract's own reader reads, and refuses the same."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire
from skerry_contract.errors import Malformed
from skerry_server import windows

from tests.unit.contract import values


@given(values.windows)
def test_a_window_reads_as_the_contract_reads_it(window: w.Window) -> None:
    assume(all(getattr(window.latency, part).total < h.MAX_SUM for part in window.latency.__struct_fields__))
    body = wire.encode(window)
    assert wire.encode(windows.read(body)) == wire.encode(wire.decode_window(body))


def test_the_usual_window_takes_one_pass_and_one_with_newer_fields_keeps_them() -> None:
    usual = windows.read(wire.encode(values.EMPTY))
    newer = windows.read(wire.encode(msgspec.structs.replace(values.EMPTY, extra={"tint": 3})))
    assert type(usual) is not w.Window
    assert type(newer) is w.Window
    assert newer.extra == {"tint": 3}


@pytest.mark.parametrize(("changes", "named"), values.IMPOSSIBLE)
def test_a_window_that_no_device_can_make_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(Malformed, match=named.replace(".", r"\.")):
        windows.read(wire.encode(msgspec.structs.replace(values.EMPTY, **changes)))
