"""The catalogue as table, JSON and page: nothing cut off, nothing out of date."""

import io
from pathlib import Path

from rich.console import Console

from frugalmoe.catalogue import COLUMNS, blocks, catalogue, format_markdown, format_table

PAGE = Path(__file__).parent.parent / "docs" / "routers.md"


def test_the_table_fits_a_terminal_of_120_columns() -> None:
    """Every word of every cell is there; papers stand as year and arXiv number."""
    rows, out = [*catalogue(), *blocks()], io.StringIO()
    Console(width=120, file=out).print(format_table(rows))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 120 and "…" not in text
    for row in rows:
        for column in set(COLUMNS) - {"paper"}:
            assert all(word in text for word in str(row[column]).split()), (row["name"], column)


def test_json_has_every_column_and_the_options() -> None:
    for row in [*catalogue(), *blocks()]:
        assert {*COLUMNS, "options", "losses", "weight_sum"} <= set(row)


def test_the_page_is_up_to_date() -> None:
    """In what it says of the strategies that it lists: a new one leaves the suite green."""
    page = PAGE.read_text()
    listed = [row for row in catalogue() if f"| `{row['name']}` |" in page]
    assert page == format_markdown(listed, blocks()) + "\n", "declarations changed: `make lint` writes docs/routers.md"
    assert len(listed) >= 34


def test_a_bar_in_a_declaration_does_not_break_the_page() -> None:
    row = catalogue()[0] | {"weights": "a | b"}
    assert "a \\| b" in format_markdown([row], [])
