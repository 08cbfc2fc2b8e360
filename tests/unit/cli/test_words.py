"""What the tool says of counts is what they are."""

import pytest
from skerry_cli.commands import device, insight
from skerry_cli.errors import Usage


def test_windows_that_were_taken_are_not_called_refused():
    counts = {"duplicate": 1, "labels_unfit": 2, "latency_unfit": 3, "profile_unfit": 88, "stale_state": 4}
    counts |= {"shadow_unfit": 7, "shadow_unknown": 9}
    behind = {
        "group_document": {"device": 1, "server": 1},
        "metadata": {},
        "records": {"reported": None},
        "lost": {},
        "refused_messages": counts | {"oversized": 5, "of_a_later_release": 6},
    }
    parts = [part.rsplit(": ", 1) for part in device._behind(behind).split("; ") if ": " in part]
    said = dict(parts)
    refused = {words: n for words, n in said.items() if "refused" in words}
    assert sorted(refused.values()) == ["5", "6"]
    assert (
        said["parts of windows left out of drift, accuracy or attributions, since they do not fit the bundle"] == "88"
    )


@pytest.mark.parametrize(("since_ms", "until_ms"), [(None, 0), (0, 0), (5, 5), (5, 4)])
def test_a_span_without_any_time_in_it_is_refused_and_not_called_up_to_now(since_ms, until_ms):
    with pytest.raises(Usage, match=f"got {since_ms or 0} to {until_ms}"):
        insight.accuracy(None, since_ms=since_ms, until_ms=until_ms)
    with pytest.raises(Usage, match=f"got {since_ms or 0} to {until_ms}"):
        insight.attributions(None, since_ms=since_ms, until_ms=until_ms)


def test_notes_of_accuracy_are_told():
    share = {"value": 0.95, "shown": "wilson", "wilson": [0.94, 0.96], "devices": 2}
    measured = {
        "accuracy": share,
        "labelled": 2000,
        "answered": 1000,
        "coverage": 2.0,
        "notes": ["more labels than answers"],
    }
    item = {"model": "gas", "version": "1.0.0", "bundle": "ab" * 32, "measured": measured}
    item |= {"labels": {"matched": 1}, "estimate": {"estimate": None}, "validated_accuracy": None}
    assert "  note: more labels than answers" in insight.accuracy_text(item)
    # A server of an older release says no notes.
    del measured["notes"]
    assert not [line for line in insight.accuracy_text(item) if "note" in line]
