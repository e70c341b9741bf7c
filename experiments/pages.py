"""Self-contained HTML pages: what the reports of all programs share."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: light-dark(#1c1e21, #e8eaed);
  --soft: light-dark(#5f6670, #a3abb5); --line: light-dark(#dfe3e8, #3a4048);
  --paper: light-dark(#fff, #15181c); --mark: light-dark(#fde9dd, #6b3517);
  --code: light-dark(#f5f6f8, #22262c); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 Charter, "Bitstream Charter", Cambria, Georgia, serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; }
p { max-width: 44rem; margin: .5rem 0; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; color: var(--soft); }
small, figcaption, .soft { color: var(--soft); font-size: .86rem; line-height: 1.45; }
.scroll { overflow-x: auto; }
p + .scroll { margin-top: 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%;
  font-size: .92rem; }
th { text-align: right; font-weight: 600; font-size: .82rem; white-space: nowrap;
  border-bottom: 1.5px solid var(--ink); padding: .35rem .6rem; }
td { text-align: right; border-bottom: 1px solid var(--line); padding: .45rem .6rem;
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 600; }
td small { display: block; white-space: nowrap; }
.text td { text-align: left; font-weight: 400; padding-left: 0; border: 0; padding: .1rem 0; }
.text td:first-child { color: var(--soft); font-weight: 400; white-space: nowrap; width: 1%;
  padding-right: 1.5rem; }
.text tbody tr:last-child td { border-bottom: 1px solid var(--line); padding-bottom: .7rem; }
.text tbody tr:first-child td { padding-top: .7rem; }
.settings { columns: 19rem; column-gap: 2rem; font-size: .86rem; }
.settings div { display: flex; justify-content: space-between; gap: 1rem; break-inside: avoid;
  border-bottom: 1px solid var(--line); padding: .15rem 0; }
.settings span:first-child { color: var(--soft); }
.wrong { background: var(--mark); }
figure { margin: 1rem 0 2rem; }
figure img { max-width: 100%; height: auto; display: block; background: #fff; }
code, pre { font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--code); padding: .8rem 1rem; overflow-x: auto; border-radius: 4px; }
@page { margin: 15mm; }
@media print {
  :root { color-scheme: light; print-color-adjust: exact; }
  body { font-size: 11pt; }
  main { padding: 0; }
  h2 { break-after: avoid; margin-top: 2rem; }
  h2 + p { break-after: avoid; }
  tr, figure, .text tbody { break-inside: avoid; }
  .scroll { overflow: visible; }
  th { white-space: normal; vertical-align: bottom; }
  th, td { padding: .3rem .35rem; font-size: 8.5pt; }
  td small { font-size: 7.5pt; }
  p { break-inside: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")


def page(title: str, body: str, style: str = "") -> str:
    """Return a page with a title, HTML below it, and rules of CSS of its own."""
    return _PAGE.substitute(title=escape(title), body=body, style=style)


def table(header: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """Return a table of titles and of rows that are HTML already; `kind` is its CSS class.

    >>> table(["n"], ["<td>1</td>"])
    '<table><thead><tr><th>n</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    of_kind = f' class="{kind}"' if kind else ""
    return f"<table{of_kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def settings(values: Mapping[str, Any]) -> str:
    """Return names and values in columns, without those that are None."""
    shown = {
        name: ", ".join(value) if isinstance(value, list) else str(value)
        for name, value in values.items()
        if value is not None
    }
    items = "".join(
        f"<div><span>{escape(name)}</span><span>{escape(value)}</span></div>"
        for name, value in shown.items()
    )
    return f'<div class="settings">{items}</div>'


def inline(path: Path) -> str:
    """Return an SVG picture as a data URL."""
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
