"""The report of a study: Markdown with valid tables, and a self-contained HTML page."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from api.cli.study.config import StudyConfig
from api.cli.study.lines import StudyLine
from api.cli.study.report import write_report
from api.cli.study.results import CommandRun, Results
from tests.support.study import (
    FIXED,
    Quality,
    measuring,
    no_results,
    result_of,
    study_of,
    trained,
    with_lines,
)

ALL_FIGURES = {"quality", "growth", "tuning", "rates", "losses", "forgetting"}
PATH = {"name": "path", "paradigm": FIXED}
VERSIONS = 3


def study(**changes: Any) -> StudyConfig:
    tuning = {"rows": ["scratch", "path"], "peak_lrs": [0.001, 0.002]}
    return study_of(
        PATH,
        {
            "name": "merge",
            "paradigm": {"name": "merge"},
            "peak_of": "path",
            "about": "no decay <b>& such</b>",
        },
        {"name": "continual", "paradigm": {"name": "continual"}},
        {"name": "low", "paradigm": {"name": "continual", "restart": "low"}},
        {"name": "wsd-s", "paradigm": {"name": "wsd_s"}, "training": {"replay_fraction": 0.25}},
        **({"seeds": [0, 1], "tuning": tuning, "about": "Made up: <script>1</script> & more."} | changes),
    )


def quality(line: StudyLine, version: int, on: int) -> float:
    """Two rows are so bad that their heat maps are identical."""
    far = {"continual": 2.0, "low": 3.0}.get(line.row.name, 1.0)
    return far * (100 + 7 * version - 5 * on + len(line.row.name) + line.seed)


def whole(make_up: Quality = quality, config: StudyConfig | None = None) -> Results:
    part = CommandRun(
        command="pathswitch study a|b.json", began="then", ended="later", lines=17, machine="2 cores"
    )
    results = trained(no_results(config or study(), VERSIONS), measuring(make_up, VERSIONS))
    return results.model_copy(update={"parts": (part,)})


class HtmlPage(HTMLParser):
    """The references, ids and tags of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: Counter[str] = Counter()
        self.feed(text)
        self.references += re.findall(r"url\(\s*[\"']?([^)\"']*)", text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name.rpartition(":")[2] in ("src", "srcset", "href", "data", "action", "poster"):
                self.references.append(value or "")


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table of the Markdown, as rows of cells."""
    found: list[list[list[str]]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert line.endswith("|"), line
            found[-1].append([cell.strip() for cell in line[1:-1].split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def lines_of(markdown: str, heading: str) -> dict[str, list[str]]:
    """The table under a heading, as cells by name of the row."""
    [table, *_] = tables(markdown.partition(f"\n## {heading}")[2])
    column = table[0].index("row")
    return {cells[column]: cells for cells in table[2:]}


def written(folder: Path, results: Results) -> str:
    path = write_report(folder, results)
    assert path == folder / "report.md"
    return path.read_text()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the report of a complete study."""
    folder = tmp_path_factory.mktemp("report")
    written(folder, whole())
    return folder


def test_a_report_consists_of_two_texts_and_their_figures(report: Path) -> None:
    files = {path.relative_to(report).as_posix() for path in report.rglob("*") if path.is_file()}
    assert files == {"report.md", "report.html", *(f"figures/{name}.svg" for name in ALL_FIGURES)}
    shown = re.findall(r"!\[[^\]]+\]\(figures/(\w+)\.svg\)", (report / "report.md").read_text())
    assert sorted(shown) == sorted(ALL_FIGURES)
    for name in ALL_FIGURES:
        assert ElementTree.parse(report / "figures" / f"{name}.svg").getroot().tag.endswith("}svg")


def test_the_page_needs_no_other_file(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = HtmlPage(text)
    assert page.tags["figure"] == page.tags["svg"] == len(ALL_FIGURES)
    assert not page.tags.keys() & {"img", "script", "link", "iframe", "object", "embed"}
    inside = [
        reference for reference in page.references if not reference.startswith("data:image/png;base64,")
    ]
    assert len(inside) < len(page.references)  # heat maps are embedded images
    assert all(reference.startswith("#") for reference in inside)
    assert "@import" not in text
    # Every reference has a target, and ids are unique.
    assert {reference[1:] for reference in inside} <= set(page.ids)
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []


def test_texts_of_the_configuration_are_escaped(report: Path) -> None:
    text = (report / "report.html").read_text()
    assert "Made up: &lt;script&gt;1&lt;/script&gt; &amp; more." in text
    assert "no decay &lt;b&gt;&amp; such&lt;/b&gt;" in text
    assert "<title>made-up</title>" in text


def test_all_rows_of_a_table_have_the_same_number_of_cells(report: Path) -> None:
    text = (report / "report.md").read_text()
    found = tables(text)
    assert len(found) == 4
    for table in found:
        assert {len(cells) for cells in table} == {len(table[0])}, table[0]
        assert all(re.fullmatch("-+:?", cell) for cell in table[1])
    page = HtmlPage((report / "report.html").read_text())
    assert page.tags["table"] == len(found)
    assert page.tags["tr"] == sum(len(table) - 1 for table in found)


def test_tables_show_the_measurements(report: Path) -> None:
    """There is one baseline. Its mean on v3 is 100 + 21 - 10 + 7 with seed 0, and 1 more with seed 1."""
    text = (report / "report.md").read_text()
    final = lines_of(text, "The final version, v3")
    assert list(final) == ["scratch", "path", "merge", "continual", "low", "wsd-s"]
    assert final["scratch"][:7] == ["1", "scratch", "2", "0.001", "100.0 %", "118.5 ± 0.7", "+0.0 ± 0.0 %"]
    gaps = sorted((115 / 118 - 1, 116 / 119 - 1))
    mean, sd = sum(gaps) / 2, (gaps[1] - gaps[0]) / 2**0.5
    assert final["path"][2:7] == [
        "2",
        "0.001",
        "70.0 %",  # (1 + 1.6 + 1.6) of 1 + 2 + 3
        "115.5 ± 0.7",
        f"{100 * mean:+.1f} ± {100 * sd:.1f} %",
    ]
    assert final["path"][-1].startswith("+0.")  # every slice gets worse
    assert lines_of(text, "By version")["path"][3::3] == ["100.0 %", "86.7 %", "70.0 %"]
    assert lines_of(text, "Peak learning rates") == {
        "scratch": ["scratch", "118.0", "118.0"],
        "path": ["path", "115.0", "115.0"],
    }
    assert "path 70.0 % (actual 70.0 %)." in text
    assert "`pathswitch study a|b.json` trained 17 lines on 2 cores from then to later." in text


def test_writing_it_again_gives_the_same_bytes(report: Path, tmp_path: Path) -> None:
    written(tmp_path, whole())
    for path in report.rglob("*.*"):
        assert (tmp_path / path.relative_to(report)).read_bytes() == path.read_bytes(), path.name


# --- missing and non-finite results ---


def test_without_a_complete_line_there_is_no_report(tmp_path: Path) -> None:
    assert write_report(tmp_path / "report", no_results(study())) is None
    assert not (tmp_path / "report").exists()


def test_non_finite_values_are_dashes(tmp_path: Path) -> None:
    """A tuning line that diverged says so."""

    def make_up(line: StudyLine, version: int, on: int) -> float | None:
        bad = line.row.name == "path" and line.seed == 1 and (version, on) == (VERSIONS, 2)
        return None if bad else quality(line, version, on)

    results = whole(make_up)
    [name] = [
        name
        for name, line in results.lines.items()
        if line.row == "scratch" and line.only_newest and line.peak_lr == 0.002
    ]
    worse = results.lines[name].model_copy(update={"error": "diverged: the loss is nan at step 7"})
    text = written(tmp_path, with_lines(results, {name: worse}))
    path = lines_of(text, "The final version, v3")["path"]
    assert path[5:7] == ["–", "–"]
    assert [cell == "–" for cell in path[7:10]] == [False, True, False]
    assert lines_of(text, "By version")["path"][-3:-1] != ["–", "–"]
    assert lines_of(text, "By version")["path"][-3] == "–"
    assert lines_of(text, "Peak learning rates")["scratch"] == ["scratch", "118.0", "diverged"]
    assert "nan" not in text
    assert "inf" not in text


def test_the_tuning_table_shows_untried_rates_and_non_finite_results(tmp_path: Path) -> None:
    """One row has an extended grid, and so a rate that the other lacks."""
    tuning = {"rows": ["scratch", "path"], "peak_lrs": [0.001, 0.002], "widen": 1}

    def make_up(line: StudyLine, version: int, on: int) -> float | None:
        bad = line.row.name == "path" and line.peak_lr == 0.001
        return None if bad else 1000 * line.peak_lr + 90

    text = written(tmp_path, whole(make_up, study(tuning=tuning)))
    assert lines_of(text, "Peak learning rates") == {
        "scratch": ["scratch", "90.5", "91.0", "92.0", "–"],
        "path": ["path", "–", "not finite", "92.0", "94.0"],
    }


@pytest.mark.parametrize(
    "kept",
    [
        {"low"},  # no baseline, no tuned row
        {"scratch"},
        {"low", "wsd-s"},
        {"scratch", "low"},
    ],
)
def test_an_incomplete_study_has_a_report(tmp_path: Path, kept: set[str]) -> None:
    """With some rows of the first seed only. Warnings of matplotlib are errors here."""
    lines = {
        name: line
        for name, line in whole().lines.items()
        if line.row in kept and line.seed == 0 and line.row != "path"
    }
    text = written(tmp_path, no_results(study(), VERSIONS).model_copy(update={"lines": lines}))
    assert set(lines_of(text, "The final version, v3")) == kept
    for table in tables(text):
        assert {len(cells) for cells in table} == {len(table[0])}
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert figures == set(re.findall(r"\(figures/(\w+)\.svg\)", text))
    assert {"quality", "forgetting"} & figures == ({"quality", "forgetting"} if "scratch" in kept else set())
    assert HtmlPage((tmp_path / "report.html").read_text()).tags["img"] == 0


def test_a_single_version_without_tuning_and_curves_has_a_report(tmp_path: Path) -> None:
    config = study_of(PATH)
    results = no_results(config, 1)
    make_up = measuring(quality, 1)

    def bare(line: StudyLine) -> Any:
        return result_of(
            line, *(version.model_copy(update={"curves": ()}) for version in make_up(line).versions)
        )

    text = written(tmp_path, trained(results, bare))
    assert lines_of(text, "The final version, v1")["path"][-1] == "–"
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"forgetting"}


def test_a_study_without_finite_lines_has_a_report(tmp_path: Path) -> None:
    config = study_of(PATH, {"name": "merge", "paradigm": {"name": "merge"}})
    text = written(tmp_path, whole(lambda line, version, on: None, config))
    assert {cells[5] for cells in lines_of(text, "The final version, v3").values()} == {"–"}
    assert "**no row**" in text
