"""A small self-contained HTML page: everything inline, nothing fetched, readable on a phone and on paper.

Text enters through `text`, which escapes it: tokens, domain names and samples can contain anything.
"""

import base64
import html
import io
import warnings
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

CSS = """
:root { color-scheme: light; --ink: #222; --grey: #666; --line: #ddd; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 56rem; padding: 1.5rem 1rem 4rem; background: #fff; color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.lead, .note { color: var(--grey); }
.note { font-size: .92rem; }
.shows { border-left: 3px solid #0072B2; padding-left: .8rem; }
figure { margin: 1rem 0; }
img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .8rem 0; }
caption { text-align: left; color: var(--grey); padding-bottom: .3rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
td.text, th.text { text-align: left; white-space: normal; }
code, pre { font: .88em/1.5 ui-monospace, "SF Mono", "Liberation Mono", Consolas, monospace; background: #f5f5f3; }
code { padding: .05em .3em; border-radius: 3px; white-space: pre-wrap; }
pre { padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 4px; }
summary { cursor: pointer; font-weight: 600; margin-top: .8rem; }
.passage { line-height: 2.5; margin: .4rem 0; overflow-wrap: anywhere; }
.passage ruby { border-radius: 3px; padding: .05em 0; white-space: pre-wrap; ruby-position: under; }
.passage rt { color: var(--ink); font-size: .62em; line-height: 1.1; user-select: none; }
.key { display: inline-block; border-radius: 3px; padding: 0 .45em; margin: 0 .5em .2em 0; font-size: .9rem; }
@media print { body { max-width: none; font-size: 10pt; padding: 0; } figure, tr, h2, h3 { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
"""


class Html(str):
    """Text that is markup already; `text` leaves it as it is."""


def text(value: object) -> Html:
    """Escaped text. Characters that HTML cannot hold are written as Python escapes."""
    if isinstance(value, Html):
        return value
    kept = "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    return Html(html.escape(kept))


def tag(name: str, content: object, cls: str = "") -> Html:
    attribute = f' class="{cls}"' if cls else ""
    return Html(f"<{name}{attribute}>{text(content)}</{name}>")


def join(parts: Iterable[object], between: str = "\n") -> Html:
    return Html(between.join(text(p) for p in parts))


def table(header: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "", text_columns: int = 1) -> Html:
    """A table whose first `text_columns` columns are text and the others numbers."""

    def row(cell: str, values: Sequence[object]) -> Html:
        return tag("tr", join((tag(cell, v, "text" * (i < text_columns)) for i, v in enumerate(values)), ""))

    title = tag("caption", caption) if caption else Html("")
    inside = join([title, tag("thead", row("th", header)), tag("tbody", join(row("td", r) for r in rows))])
    return tag("div", tag("table", inside), "wide")


def picture(wide: bytes, narrow: bytes, description: str) -> Html:
    """A PNG file, and the one that a telephone shows in its place."""
    wide, narrow = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (wide, narrow))
    source = f'<source media="(max-width: 40rem)" srcset="{narrow}">'
    return tag("figure", Html(f'<picture>{source}<img alt="{text(description)}" src="{wide}"></picture>'))


def folded(title: str, content: Html, group: str = "", is_open: bool = False) -> Html:
    """A title that shows its content when it is chosen; of a group one at a time."""
    attributes = (f' name="{text(group)}"' if group else "") + (" open" if is_open else "")
    return Html(f"<details{attributes}>{join([tag('summary', title), content])}</details>")


def document(title: str, body: Html) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def png(figure: Figure) -> bytes:
    """The picture without the time and version that matplotlib would write into it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a domain's name in a script that the font lacks: a box
        figure.savefig(buffer, format="png", metadata={"Software": None}, dpi=160)
    return buffer.getvalue()
