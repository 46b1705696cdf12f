"""Text out of what holds it: pieces of a long text, the words of a web page or of a manual page."""

import html.parser
import re
from collections.abc import Iterator


def cut(text: str, characters: int) -> Iterator[str]:
    """Yields pieces that join to the text. All but the last have at least `characters`, and end with a blank line or a
    line where one is near.
    """
    start = 0
    while start < len(text):
        near = start + characters
        ends = [text.find(mark, near, near + characters) + len(mark) for mark in ("\n\n", "\n")]
        end = next((end for end in ends if end > near), near)
        yield text[start:end]
        start = end


def html_words(page: str) -> str:
    """Returns the words that a browser shows of a page, without headers, footers and navigation; blank lines stand
    between blocks.
    """
    reader = _Page()
    reader.feed(page)
    reader.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(reader.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


HIDDEN = {"head", "script", "style", "nav"}
CHROME = {"header", "footer", "navheader", "navfooter"}  # classes of a <div>
ROWS = {"li", "dt", "dd", "tr", "br"}
BLOCKS = {"p", "div", "pre", "h1", "h2", "h3", "h4", "h5", "table", "ul", "ol", "dl"}


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = ""  # the element that hides all inside it
        self.depth = 0  # of elements of that name inside it

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self.hidden:
            self.depth += tag == self.hidden
        elif tag in HIDDEN or (tag == "div" and CHROME.intersection(_classes(attributes))):
            self.hidden, self.depth = tag, 1
        elif tag in ROWS or tag in BLOCKS:
            self.parts.append("\n" if tag in ROWS else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == self.hidden:
            self.depth -= 1
            self.hidden = self.hidden if self.depth else ""

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if data.strip() else re.sub(r"\s+", " ", data))


def _classes(attributes: list[tuple[str, str | None]]) -> list[str]:
    return (dict(attributes).get("class") or "").split()


# Requests whose arguments are no text.
SETTINGS = re.compile("TH|so|de|ds|nr|if|ie|el|ft|ta|ti|in|ne|ad|na|hy|nh|tr|rm|mso|ig|als|am|po|ll|lg|cs|fam|TS|TE|UE")
BREAKS = {"SH", "SS", "PP", "P", "LP", "TP", "IP", "HP", "Sh", "Ss", "Pp", "It", "sp"}
WIDTHS = {"TP": 0, "HP": 0, "sp": 0, "IP": 1}  # how many arguments are text: the others say how far to indent
ALTERNATING = {"BR", "BI", "IR", "RB", "RI", "IB"}  # fonts change from word to word, with no space between
CHARACTERS = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "bu": "•", "em": "—", "en": "–", "co": "©",
    "ti": "~", "ha": "^", "rs": "\\", "mu": "×", "<=": "≤", ">=": "≥", "->": "→", "hy": "-", "ga": "`", "pl": "+",
}  # fmt: skip
ESCAPE = re.compile(
    r"""\\(?:
    (?P<comment>["\#].*)
  | [fFmM] (?:\[[^\]]*\] | \(.. | .)                  # a font or colour
  | s [+-]? (?:\[[^\]]*\] | '[^']*' | \(.. | \d{1,2})  # a size
  | [*nkg] (?:\[[^\]]*\] | \(.. | .)                   # a variable
  | [hvwZLlDoRX] '[^']*'                               # movement
  | \( (?P<two>..) | \[ (?P<long>[^\]]*) \]
  | (?P<one>.)
  | $ )""",
    re.X,
)
ONE = {"e": "\\", "~": " ", "0": " ", **dict.fromkeys("&,/|^:%c)!{}dupz", "")}


def roff_words(page: str) -> str:
    """Returns the words of a manual page (`man` or `mdoc` macros), without comments, requests and fonts."""
    lines: list[str] = []
    # What `ig` leaves out and `de` defines goes on to a line of two dots.
    for line in re.sub(r"(?ms)^\.\s*(?:ig|dei?1?|am)\b.*?^\.\.\s*$", "", page).split("\n"):
        if line.startswith((".", "'")):
            name, _, rest = line[1:].strip().partition(" ")
            if not name or SETTINGS.fullmatch(name) or name[0] in '\\".':
                continue
            words = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"?|(\S+)', rest)][: WIDTHS.get(name)]
            line = ("" if name in ALTERNATING else " ").join(words)
            if name in BREAKS:
                lines.append("")
            if not line:
                continue
        lines.append(ESCAPE.sub(_character, line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _character(found: re.Match) -> str:
    if name := found["two"] or found["long"]:
        return CHARACTERS.get(name, "")
    one = found["one"] or ""
    return ONE.get(one, one)
