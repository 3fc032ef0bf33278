"""Stop strings end the text and are never shown, not even in part."""

import pytest

from workers.serving.engine.text.stop_strings import StopStrings


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        (["one ST", "OP two"], ["one ", ""]),
        (["one ST", "ART"], ["one ", "START"]),
        (["SSTOP"], ["S"]),
        (["a\n", "\nb"], ["a", ""]),
    ],
)
def test_no_part_of_a_stop_string_is_shown(texts: list[str], shown: list[str]) -> None:
    stop = StopStrings(["STOP", "\n\n"])
    assert [stop.push(text) for text in texts] == shown


def test_the_earliest_stop_string_counts() -> None:
    stop = StopStrings(["later", "so"])
    assert stop.push("and so later") == "and "
    assert stop.hit


def test_text_withheld_for_an_incomplete_stop_string_is_flushed() -> None:
    stop = StopStrings(["STOP"])
    assert stop.push("ST") == ""
    assert stop.flush() == "ST"
    assert not stop.hit
