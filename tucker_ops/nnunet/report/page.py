"""The report as one HTML page beside its figures; it needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tucker_ops.nnunet.report.tables import TextTable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .8rem 0 }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem }
th, td { padding: .15rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #888 }
img { max-width: 100% } .missing { color: #777; font-style: italic } .wide { overflow-x: auto }
"""


@dataclass(frozen=True)
class Section:
    """A heading with its text, tables and figure files; ``missing`` says why the section has none."""

    title: str
    text: str = ""
    tables: Sequence[TextTable] = ()
    figures: Sequence[str] = ()
    missing: str | None = None


def render_page(title: str, sections: Sequence[Section]) -> str:
    """The page's HTML. All text is escaped; figures are referred to by file name."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{escape(section.text)}</p>")
        if section.missing is not None:
            parts.append(f'<p class="missing">Left out: {escape(section.missing)}</p>')
        parts += [_table(table) for table in section.tables]
        parts += [f'<img src="{escape(f)}" alt="{escape(section.title)}">' for f in section.figures]
    return "\n".join([*parts, "</body></html>", ""])


def _table(table: TextTable) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    rows = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows]
    return (
        f'<div class="wide"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
