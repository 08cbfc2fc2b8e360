"""A group's settings as a person writes them."""

from __future__ import annotations

import msgspec
import pytest
from skerry_cli import group_settings
from skerry_cli.errors import Usage
from skerry_contract import group


def test_every_kind_of_setting_can_be_written() -> None:
    found = group_settings.parse(
        [
            "sync_s=60",
            "shadow_share=0.5",
            "networks=wifi,unmetered",
            "opens_at=2027-01-31T22:00Z",
            "fetch_windows=daily 18:00-08:00",
            "windows=fri sat 22:00-04:00, daily 12:00-13:00",
            "jitter_s=",
        ]
    )
    assert found == {
        "sync_s": 60, "shadow_share": 0.5, "networks": ["wifi", "unmetered"], "opens_at": 1801432800, "fetch_windows": [{"start": "18:00", "end": "08:00"}], "jitter_s": None,
        "windows": [{"days": ["fri", "sat"], "start": "22:00", "end": "04:00"}, {"start": "12:00", "end": "13:00"}],
    }  # fmt: skip
    msgspec.convert({name: value for name, value in found.items() if value is not None}, group.Settings)


def test_every_setting_of_the_contract_can_be_written() -> None:
    assert set(group.Settings.__struct_fields__) == group_settings.NUMBERS | set(group_settings.OTHERS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sync=60", "wanted NAME=VALUE"),
        ("sync_s", "wanted NAME=VALUE"),
        ("sync_s=soon", "wanted a number, got 'soon'"),
        ("opens_at=2027-01-31T22:00", "wanted a time as 2027-01-31T22:00Z"),
        ("opens_at=tomorrow", "wanted a time as"),
        ("windows=22:00", "wanted hours as"),
        ("windows=friday 22:00-04:00", "wanted hours as"),
        ("windows=", None),
    ],
)
def test_what_is_no_setting_is_refused_with_what_was_wanted(text: str, wanted: str | None) -> None:
    if wanted is None:
        assert group_settings.parse([text]) == {"windows": None}
        return
    with pytest.raises(Usage, match="--set") as refused:
        group_settings.parse([text])
    assert wanted in refused.value.message
