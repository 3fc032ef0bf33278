"""Braille charts and the positions of their dots."""

from api.cli.chart import Series, chart


def plot(*series: Series, from_zero: bool = False) -> list[str]:
    """The rows of a small plot, four cells wide and two high."""
    return [line.plain[9:] for line in chart("loss", series, 13, 2, from_zero=from_zero)[1:-1]]


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right() -> None:
    assert plot(Series([(0, 0.0), (7, 1.0)])) == ["⠀⠀⡠⠊", "⡠⠊⠀⠀"]


def test_a_flat_line_and_a_single_point_are_centred() -> None:
    assert plot(Series([(0, 1.0), (7, 1.0)])) == ["⣀⣀⣀⣀", "⠀⠀⠀⠀"]
    assert plot(Series([(3, 2.0)])) == ["⡀⠀⠀⠀", "⠀⠀⠀⠀"]


def test_from_zero_shows_a_constant_rate_at_the_top() -> None:
    assert plot(Series([(0, 2e-3), (7, 2e-3)]), from_zero=True) == ["⠉⠉⠉⠉", "⠀⠀⠀⠀"]


def test_every_line_has_the_requested_width() -> None:
    lines = chart("rate", [Series([(0, 0.0), (1000, 1.0)])], 30, 3)
    assert [len(line.plain) for line in lines[1:]] == [30] * 4
    assert lines[1].plain.startswith("       1 ")
    assert lines[-1].plain == "         step 0" + " " * 10 + "1,000"


def test_no_points_give_an_empty_chart() -> None:
    assert [line.plain.strip() for line in chart("loss", [], 20, 2)] == ["loss", "", "", ""]


def test_two_series_share_one_frame_and_keep_their_colours() -> None:
    top = chart("", [Series([(0, 1.0), (3, 1.0)], "blue"), Series([(4, 1.0), (7, 0.0)], "green")], 13, 1)[1]
    assert [(span.start, span.style) for span in top.spans][1:] == [
        (9, "blue"),
        (10, "blue"),
        (11, "green"),
        (12, "green"),
    ]
