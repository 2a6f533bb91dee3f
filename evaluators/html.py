"""Pieces of a self-contained HTML page: no script, no request, no fonts; light or dark as the reader has it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--faint:#c9ced6;--soft:#5b6470;--card:#f6f7f9;
--pass:#0b6e4f;--fail:#b3261e;--inconclusive:#8a5a00}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--paper:#14171c;--faint:#3c434d;--soft:#9aa4b1;--card:#1c2027;
--pass:#4cc79a;--fail:#ff8a80;--inconclusive:#f2b84b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:24px 16px 64px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.6rem;margin:0 0 .2em}h2{font-size:1.05rem;margin:0 0 .5em}
.PASS{color:var(--pass)}.FAIL{color:var(--fail)}.INCONCLUSIVE{color:var(--inconclusive)}
p{margin:.3em 0}.soft{color:var(--soft)}code{overflow-wrap:anywhere;font-size:.92em}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,200px),1fr));margin:16px 0}
.tiles div{background:var(--card);border-radius:10px;padding:12px 16px}.tiles b{display:block;font-size:1.25rem}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));margin:16px 0}
section{background:var(--card);border-radius:10px;padding:16px;min-width:0;break-inside:avoid}
svg{display:block;width:100%;height:auto;color:var(--ink)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px 4px 0;text-align:right;border-bottom:1px solid var(--faint);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:9em}
td.text{text-align:left;white-space:normal}th{font-weight:600;color:var(--soft)}
@media (max-width:640px){table{font-size:.8rem}th,td{white-space:normal;padding:4px 6px 4px 0}
th:first-child,td:first-child{min-width:0}}
@media print{body{max-width:none}section{border:1px solid var(--faint)}}
"""


def document(title: str, body: Sequence[str]) -> bytes:
    """A whole page of HTML pieces, UTF-8."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    return page.encode()


def tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """A box for each figure: its name, its value, and a word beside it; all are escaped."""
    boxes = (
        f'<div><span class="soft">{escape(name)}</span><b>{escape(value)}</b><span class="soft">{escape(beside)}</span>'
        "</div>"
        for name, value, beside in rows
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def section(name: str, title: str, how: str, svg: str | None, missing: str = "Not available.") -> str:
    """A drawing with its title and how to read it."""
    if svg is None:
        return f'<section id="{name}"><h2>{title}</h2><p class="soft">{missing}</p></section>'
    return f'<section id="{name}"><h2>{title}</h2>{svg}<p class="soft">{escape(how)}</p></section>'


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], missing: str = "Not available.") -> str:
    """Rows of text under a head; what lies in them is escaped."""
    if not rows:
        return f'<section><h2>{title}</h2><p class="soft">{missing}</p></section>'
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<section><h2>{title}</h2><div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></section>"
    )
