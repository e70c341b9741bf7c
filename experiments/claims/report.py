"""report.html: all claims as one article in one file, theme after theme."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from experiments import pages
from experiments.claims.claim import Theme, all_claims, all_themes
from experiments.files import write_text

Record = dict[str, Any]

_STYLE = """h3 { font-size: 1.08rem; margin: 2.4rem 0 .3rem; max-width: 46rem; }
h3 .number { color: var(--soft); font-weight: 400; margin-right: .5rem; }
.verdict { display: inline-block; font-weight: 600; border-radius: 4px; padding: .05rem .5rem; }
.holds { background: #dcf1e4; color: #135c33; }
.only { background: #dcecf8; color: #0b4a75; }
.fails { background: #fde3da; color: #8a2c0d; }
.open { background: #f3eecb; color: #655407; }
dl { display: grid; grid-template-columns: 6.2rem 1fr; gap: .1rem .8rem; max-width: 46rem;
  margin: .5rem 0; font-size: .88rem; color: var(--soft); }
dt { font-weight: 600; } dd { margin: 0; }
section figure img { max-width: 38rem; width: 100%; }
td.left, .claims td { text-align: left; font-weight: 400; } .claims th { text-align: left; }
a { color: inherit; text-decoration-color: var(--line); }
nav { columns: 17rem; font-size: .92rem; margin: 1.2rem 0; }
"""
_BODY = Template("""<p class="lead">$lead</p>
<p>Below each claim stands what is measured, and what decides. The verdict is computed from the
numbers by the criterion that stands beside it. Intervals in brackets are 95%
bootstrap intervals over seeds or draws, unless it says otherwise; where several trained arms are
compared, a paired permutation test over seeds has to agree.</p>
<h2>At a glance</h2>
<div class="scroll">$glance</div>
$wrong
$chapters
<h2>How to get this again</h2>
<pre>$command</pre>
$settings""")
_CLASSES = {
    "holds": "holds",
    "holds only if": "only",
    "does not hold": "fails",
    "failed": "fails",
}


def write(results: Record, folder: Path) -> Path:
    """Write the report and return its path."""
    claims = results["claims"]
    counts = Counter(record["outcome"] for record in claims)
    found = "; ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    body = _BODY.substitute(
        lead=escape(
            f"{len(claims)} sentences that courses, blogs and papers say about additive and "
            f"multiplicative attention, and what came out: {found}."
        ),
        glance=_glance(claims),
        wrong=_wrong(claims),
        chapters="".join(
            _chapter(theme, of_theme, folder)
            for name, theme in all_themes().items()
            if (of_theme := [record for record in claims if record["theme"] == name])
        ),
        command=escape(command(results)),
        settings=pages.settings(
            {"setting": results["setting"], "seconds": results["seconds"], **results["environment"]}
        ),
    )
    path = folder / "report.html"
    page = pages.page("Claims about attention, tested", body, _STYLE)
    write_text(path, page)
    return path


def command(results: Record) -> str:
    """Return the command line that these results come from."""
    numbers = [record["number"] for record in results["claims"]]
    some = len(numbers) < len(all_claims())
    chosen = f" --claims={','.join(map(str, numbers))}" if some else ""
    return f"python -m experiments.claims{chosen} --setting={results['setting']}"


def _glance(claims: list[Record]) -> str:
    rows = [
        f'<td><a href="#c{record["number"]}">{record["number"]}</a></td>'
        f"<td>{escape(record['claim'])}</td><td>{_badge(record)}</td>"
        for record in claims
    ]
    return pages.table(["", "claim", "verdict"], rows, "claims")


def _wrong(claims: list[Record]) -> str:
    """List the claims that do not hold."""
    of = [record for record in claims if record["outcome"] == "does not hold"]
    if not of:
        return ""
    items = "".join(
        f'<li><a href="#c{record["number"]}">{escape(record["claim"])}</a> '
        f"<span class=soft>{escape(record['because'])}</span></li>"
        for record in of
    )
    return f"<h2>Where the textbook is wrong</h2><ul>{items}</ul>"


def _chapter(theme: Theme, claims: list[Record], folder: Path) -> str:
    sections = "".join(_section(record, folder) for record in claims)
    return f"<h2>{escape(theme.title)}</h2><p>{escape(theme.about)}</p>{sections}"


def _section(record: Record, folder: Path) -> str:
    listed = "".join(
        f"<dt>{name.capitalize()}</dt><dd>{escape(record[name])}</dd>"
        for name in ("source", "method", "criterion", "published")
        if record[name]
    )
    figure = ""
    if record.get("figure"):
        image = pages.inline(folder / "figures" / f"{record['figure']}.svg")
        figure = f'<figure><img alt="{escape(record["claim"])}" src="{image}"></figure>'
    return (
        f'<section id="c{record["number"]}"><h3><span class="number">{record["number"]}</span>'
        f"{escape(record['claim'])}</h3><p>{_badge(record)} {escape(record['because'])}</p>"
        f"{_table(record.get('table'))}{figure}<dl>{listed}</dl></section>"
    )


def _table(rows: list[list[str]] | None) -> str:
    if not rows:
        return ""
    header, *body = rows
    cells = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in body]
    return f"<div class=scroll>{pages.table(header, cells)}</div>"


def _badge(record: Record) -> str:
    kind = _CLASSES.get(record["outcome"], "open")
    return f'<span class="verdict {kind}">{escape(record["verdict"])}</span>'
