"""A report in one HTML file: no network, no script, pictures inside.

`Report` is data, `render` is a pure function of it. What a training run puts in one is in `run_report.py`.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from experiments.run.formatting import measurement


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under headings. Numbers stand to the right; a nested name is indented by its `depth`.

    Attributes:
      columns: the headings.
      rows: cells; floats are shortened to four digits, integers grouped by thousands,
        strings shown as they are.
      depths: one a row, how far its first cell is indented; empty for a flat table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    depths: Sequence[int] = ()


@dataclass(frozen=True)
class Figure:
    """A PNG with what it shows in words, for those who cannot see it.

    Attributes:
      png: the picture.
      alt: what it shows.
      caption: a line beneath it.
      plot: whether it is dark lines on white, which a dark page inverts; photographs are left alone.
      pixelated: whether its pixels are the content and stay sharp when enlarged.
    """

    png: bytes
    alt: str
    caption: str = ""
    plot: bool = False
    pixelated: bool = False


@dataclass(frozen=True)
class Code:
    """Text in which every space counts: a command, a config."""

    text: str


Part = Text | Table | Figure | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands beneath it; consecutive figures share rows where the page is wide.

    Attributes:
      title: the heading.
      parts: in order.
      folded: whether it starts closed, for what few readers need.
    """

    title: str
    parts: Sequence[Part]
    folded: bool = False


@dataclass(frozen=True)
class Report:
    """A title, a few headline values, and sections.

    Attributes:
      title: what was run.
      summary: name to value, shown large at the top.
      sections: in order.
      subtitle: a line beneath the title.
    """

    title: str
    summary: Mapping[str, str]
    sections: Sequence[Section] = field(default_factory=tuple)
    subtitle: str = ""


def render(report: Report) -> str:
    """Returns the report as a complete HTML document. Everything given is escaped."""
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in report.summary.items()
    )
    subtitle = f"<p class=subtitle>{escape(report.subtitle)}</p>" if report.subtitle else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(report.title)}</h1>{subtitle}</header>\n"
        f"<dl class=summary>{facts}</dl>\n"
        f"{''.join(map(_section, report.sections))}</main>\n</body>\n</html>\n"
    )


def with_section(page: str, section: Section) -> str:
    """A rendered report with one more section, or with another one in the place of its namesake.

    It stands before "To run it again", where the results of a run end.
    """
    made = _section(section)
    heading = f"<section><h2>{escape(section.title)}</h2>"
    start = page.find(heading)
    if start >= 0:
        end = page.index("</section>\n", start) + len("</section>\n")
        return page[:start] + made + page[end:]
    start = page.find("<section><h2>To run it again</h2>")
    start = page.index("</main>") if start < 0 else start
    return page[:start] + made + page[start:]


def _section(section: Section) -> str:
    content, figures = "", ""
    for part in section.parts:
        if isinstance(part, Figure):
            figures += _figure(part)
            continue
        content += _row(figures) + _RENDERERS[type(part)](part)
        figures = ""
    content += _row(figures)
    title = escape(section.title)
    if section.folded:
        return f"<details><summary><h2>{title}</h2></summary>\n{content}</details>\n"
    return f"<section><h2>{title}</h2>\n{content}</section>\n"


def _row(figures: str) -> str:
    return f"<div class=figures>{figures}</div>\n" if figures else ""


def _text(part: Text) -> str:
    return f"<p>{escape(part.text)}</p>\n"


def _code(part: Code) -> str:
    # Focusable, so that a keyboard can scroll what is wider than the page.
    return f"<pre tabindex=0>{escape(part.text)}</pre>\n"


def _figure(part: Figure) -> str:
    classes = " ".join(name for name in ("plot", "pixelated") if getattr(part, name))
    data = base64.b64encode(part.png).decode()
    caption = f"<figcaption>{escape(part.caption)}</figcaption>" if part.caption else ""
    return (
        f'<figure class="{classes}"><img alt="{escape(part.alt)}" src="data:image/png;base64,{data}">'
        f"{caption}</figure>\n"
    )


def _table(part: Table) -> str:
    numeric = [
        any(_is_number(row[column]) for row in part.rows)
        and all(_is_number(row[column]) or row[column] in ("", None) for row in part.rows)
        for column in range(len(part.columns))
    ]
    depths = part.depths or (0,) * len(part.rows)
    head = "".join(
        f"<th scope=col{' class=n' if n else ''}>{escape(name)}</th>"
        for name, n in zip(part.columns, numeric, strict=True)
    )
    body = ""
    for row, depth in zip(part.rows, depths, strict=True):
        cells = "".join(
            f"<td{' class=n' if n else ''}>{escape(_cell(value))}</td>"
            for value, n in list(zip(row, numeric, strict=True))[1:]
        )
        indent = f' style="padding-left:{0.6 + 1.1 * depth:.1f}em"' if depth else ""
        body += f"<tr><th scope=row{indent}>{escape(_cell(row[0]))}</th>{cells}</tr>\n"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    return f"<div class=scroll tabindex=0>{table}</div>\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not _is_number(value):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else measurement(value)


_RENDERERS: dict[type, Any] = {Text: _text, Table: _table, Code: _code}

_STYLE = """
:root { --page: #ffffff; --ink: #1c1f24; --soft: #5b6470; --line: #dfe3e8; --panel: #f5f7f9;
  --accent: #2f6fdb }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e6e9ed; --soft: #9aa4b1; --line: #2c333b; --panel: #1c2127;
    --accent: #7aa7f5 }
  .plot img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
header { border-bottom: 1px solid var(--line); margin-bottom: 1.25rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem }
.subtitle { color: var(--soft); margin: 0 0 .9rem; overflow-wrap: anywhere }
.summary { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem; margin: 0 }
.summary div { background: var(--panel); border-radius: 8px; padding: .6rem .8rem }
.summary dt { color: var(--soft); font-size: .8rem }
.summary dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
figure { margin: 0 }
img { display: block; max-width: 100%; height: auto; border-radius: 6px }
.plot img { width: 100% }
.pixelated img { image-rendering: pixelated }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .3rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; min-width: 60% }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem .6rem;
  border-bottom: 1px solid var(--line) }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap }
tbody th { font-weight: 400 }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre { background: var(--panel); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; margin: .5rem 0;
  font: .82rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
summary { cursor: pointer; margin-top: 2.2rem }
summary h2 { display: inline; margin: 0 }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
"""
