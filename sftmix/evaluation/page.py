"""The look of every page that sftmix writes: one self-contained HTML file, without scripts and
without requests; everything that comes from data is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftmix.errors import counted


def render(package: str, template: str, **content: Any) -> str:
    """Returns a page. template: a file of `package` that extends `page.html.j2`. Raises jinja2's
    UndefinedError for content that the template needs and does not get."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    folders = dict.fromkeys((package, "sftmix.evaluation"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in folders]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "count": "{:,}".format,
        "figure": "{:,.5g}".format,
        "percent": "{:.1%}".format,
        "counted": counted,
    }
    return environment.get_template(template).render(**content)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown; the columns after the first are aligned to the right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def aligned(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table as lines of plain text, the titles first; the columns after the first are
    aligned to the right."""
    table = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in table
    ]
