"""One self-contained HTML page: plain HTML and CSS, with embedded images."""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; background: #fff; color: #1a1a1a;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: .9rem; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number, th.number { text-align: right; }
.scroll { overflow-x: auto; }
summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Picture:
    """An image of the page."""

    path: Path
    heading: str
    caption: str


def facts_table(facts: dict[str, str]) -> str:
    """A table of names and values."""
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()
    )
    return f"<table>{rows}</table>"


def number_table(header: list[str], rows: list[list[str]], identifier: str) -> str:
    """A table whose first column is text and whose others are numbers."""

    def cells(tag: str, row: list[str]) -> str:
        return "".join(f"<{tag}{' class=number' if i else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f"<div class=scroll><table id={identifier}><thead><tr>{cells('th', header)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def figure_html(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f"<h2>{escape(picture.heading)}</h2><figure id={escape(picture.path.stem)}>"
        f"<img src='data:image/png;base64,{data}' alt='{escape(picture.heading)}'>"
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def html_page(title: str, parts: list[str]) -> str:
    """`parts` are HTML."""
    body = "\n".join(parts)
    return (
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<link rel=icon href='data:,'><title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )
