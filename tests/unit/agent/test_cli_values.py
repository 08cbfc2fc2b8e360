"""What is typed wrong is named with what was wanted, before an agent is asked."""

from __future__ import annotations

import pytest
from skerry_agent import cli


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["throttle", "--rate", "0"], "0 is no bound: --off lifts the throttle"),
        (["throttle", "--rate", "nan"], "wanted a number of inferences per second above 0, got 'nan'"),
        (["throttle", "--rate", "inf"], "wanted a number of inferences per second above 0, got 'inf'"),
        (["throttle", "--rate", "-3"], "wanted a number of inferences per second above 0, got '-3'"),
        (["throttle", "--rate", "5", "--for", "infs"], "wanted a time as 30s, 10m, 2h or 1d, got 'infs'"),
        (["throttle", "--rate", "5", "--for", "-1h"], "--for"),
        (["logs", "--last", "-1"], "--last"),
        (["logs", "--last", "0"], "wanted a number from 1, got '0'"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(
    arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert wanted in capsys.readouterr().err
