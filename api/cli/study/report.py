"""Writes the report of a study, as Markdown with figures and as a self-contained HTML page."""

import math
import re
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt

from api.cli.study.analysis import Analysis, Spread
from api.cli.study.figures import draw_figures
from api.cli.study.lines import score, tuned, tuned_peaks
from api.cli.study.results import LineResult, Results

MARKDOWN, HTML, FIGURES = "report.md", "report.html", "figures"

_IMAGE = re.compile(r'<p><img src="figures/([a-z]+)\.svg" alt="([^"]*)" */?></p>')


def write_report(folder: Path, results: Results) -> Path | None:
    """Write both forms and the figures. Returns the path of the Markdown; None if no line is complete yet."""
    analysis = Analysis(results)
    if not analysis.rows:
        return None
    figures = draw_figures(analysis)
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        (folder / FIGURES / f"{name}.svg").write_text(svg)
    text = to_markdown(analysis, frozenset(figures))
    (folder / MARKDOWN).write_text(text)
    (folder / HTML).write_text(to_html(results.config.name, text, figures))
    return folder / MARKDOWN


def to_markdown(analysis: Analysis, figures: frozenset[str]) -> str:
    environment = Environment(
        autoescape=False,  # the output is Markdown, and markdown-it escapes it for HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "percent": _percent,
        "gap": _gap,
        "value": _value,
        "nats": _nats,
        "tuned_score": _tuned_score,
        "rate": lambda rate: f"{rate:g}",
    }
    template = environment.from_string(_template("report.md.j2"))
    return template.render(
        analysis=analysis,
        results=analysis.results,
        config=analysis.config,
        figures=figures,
        tuned=lambda name: tuned(analysis.config, name, analysis.results),
        tuned_peaks=tuned_peaks(analysis.config, analysis.results),
    )


def to_html(title: str, markdown: str, figures: dict[str, str]) -> str:
    """Render the Markdown as a page that needs no other file, with the figures inlined as SVG."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = _IMAGE.sub(
        lambda found: (
            f'<figure role="img" aria-label="{found[2]}">{_inline(figures[found[1]], found[1])}</figure>'
        ),
        body,
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_template("page.html.j2")).render(title=title, body=body)


def _inline(svg: str, name: str) -> str:
    """Prefix all ids in the SVG with the figure's name, because ids must be unique within the page."""
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href|href)="#', rf'\1="#{name}-', svg)
    return re.sub(r"url\(#", f"url(#{name}-", svg)


def _template(name: str) -> str:
    return (resources.files("api.cli.study") / "templates" / name).read_text()


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _gap(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    sd = f" ± {100 * spread.sd:.1f}" if spread.sd is not None else ""
    return f"{100 * spread.mean:+.1f}{sd} %"


def _value(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.1f}" + (f" ± {spread.sd:.1f}" if spread.sd is not None else "")


def _tuned_score(result: LineResult | None) -> str:
    if result is None:
        return "–"
    if result.error is not None:
        return result.error.partition(":")[0]
    return f"{score(result):.1f}" if math.isfinite(score(result)) else "not finite"


def _nats(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.mean:+.3f}"
