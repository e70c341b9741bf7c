"""report.html: everything about a run in one file that needs nothing else to be read."""

from __future__ import annotations

import base64
import difflib
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from experiments.translate import table
from experiments.translate.config import Config
from experiments.translate.workdir import Record

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1c1e21; --soft: #5f6670; --line: #dfe3e8; --paper: #fff; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 Charter, "Bitstream Charter", Cambria, Georgia, serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; }
p { max-width: 44rem; margin: .5rem 0; }
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
.wrong { background: #fde9dd; }
figure { margin: 1rem 0 2rem; }
figure img { max-width: 100%; height: auto; display: block; }
code, pre { font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: #f5f6f8; padding: .8rem 1rem; overflow-x: auto; border-radius: 4px; }
@media print { main { padding: 0; } }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="lead">$lead</p>

<h2>Result</h2>
<div class="scroll">$table</div>
<p class="soft">$legend</p>
$comparison

<h2>How fast each one gets there</h2>
<figure><img alt="Learning curves" src="$curves">
<figcaption>On the validation set. $bands</figcaption></figure>

<h2>Where they look</h2>
<p class="soft">Each row is a word of the reference, which the translator of seed 0 is made to
write; each column a word of the source. The darker, the more of the attention (from 0, white, to
1, dark blue) lies there while the word is chosen. &lt;eos&gt; is the end of the sentence.$gold</p>
$alignments

<h2>What they say</h2>
<p class="soft">The first sentences of the test set, not chosen; translations of seed 0, with the
words marked that are not the reference's.</p>
<div class="scroll">$translations</div>

$extra

<h2>The data</h2>
<p>$data</p>
$notices

<h2>How to get this again</h2>
<pre>$command</pre>
<div class="settings">$settings</div>
</main>
</body>
</html>
""")

_EXTRA = (
    ("exact_match", "exact match %", 1),
    ("token_accuracy", "token acc. %", 1),
    ("bleu", "BLEU", 1),
    ("chrf", "chrF", 1),
    ("alignment_error", "AER %", 1),
)
_LONG = "Sentences that are longer than any in training."
_GOLD = (
    " Frames are gold links: a translator would be right to look there (dotted: possible, not "
    "required). Of the sentences of readable length these change the order of words most."
)


def write(
    results: Record, outcomes: Sequence[Record], figures: Sequence[str], folder: Path
) -> Path:
    """Write the report and return its path."""
    scores = [outcome["score"] for outcome in outcomes]
    data, config = results["data"], results["config"]
    page = _PAGE.substitute(
        title=escape(" against ".join(scores[:2]) if len(scores) == 2 else ", ".join(scores)),
        lead=escape(
            f"{_subject(scores)}, trained on {data['pairs']['train']:,} sentence pairs "
            f"({data['name']}) in {config['steps']:,} steps, "
            f"{config['seeds']} seed{'s' * (config['seeds'] > 1)} each."
        ),
        table=_result_table(results),
        legend=escape(_legend(results)),
        comparison=_comparison(results),
        curves=_inline(folder / "figures" / "learning_curves.svg"),
        bands=escape(_bands(results)),
        gold=_GOLD if outcomes[0]["pictures"][0]["gold"] else "",
        alignments="".join(
            f'<figure><img alt="{name}" src="{_inline(folder / "figures" / f"{name}.svg")}">'
            "</figure>"
            for name in figures
            if name.startswith("alignment")
        ),
        translations=_translations(outcomes),
        extra=_extra(results),
        command=escape(command(config)),
        data=escape(
            f"{data['name']}: {_counted(data['pairs'])} pairs; {data['source_words']:,} words of "
            f"the source language and {data['target_words']:,} of the target language are known."
        ),
        notices="".join(f"<p class='soft'>{escape(n)}</p>" for n in data["notices"]),
        settings=_settings({**config, **results["environment"]}),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def command(config: Record, program: str = "experiments.translate") -> str:
    """Return the command line of a run, with the flags that differ from their defaults."""
    plain = Config().identity
    flags = [
        f"--{name}={','.join(value) if isinstance(value, list) else value}"
        for name, value in config.items()
        if value != plain[name]
    ]
    return shlex.join(["python", "-m", program, *flags])


def _subject(scores: Sequence[str]) -> str:
    if len(scores) == 1:
        return "A translator with attention"
    return "Translators that differ in nothing but the score of their attention"


def _legend(results: Record) -> str:
    """Say what the columns of the result are, those that are there."""
    names = {name for name, _, _ in table.columns(results)}
    parts = [
        f"Test set of {results['data']['pairs']['test']:,} pairs, {table.decoding(results)}.",
        f"{table.over_seeds(results)}.",
        "Valid loss is the cross-entropy of a token of the validation set, in nats.",
        "Exact match counts the sentences that are right in every word.",
    ]
    if "alignment_error" in names:
        parts.append(
            "AER is the alignment error rate of the largest weight of each target word against "
            "the gold alignment: lower is better."
        )
    if "steps_to_90" in names:
        parts.append("“Steps to 90%”: first validated step with 90% exact match.")
    signatures = results["signatures"]
    parts += [
        "Tokens per second count both languages and all seeds together.",
        f"BLEU {signatures['bleu']}; chrF {signatures['chrf']}.",
    ]
    return " ".join(parts)


def _bands(results: Record) -> str:
    seeds = results["config"]["seeds"]
    found = "One seed." if seeds == 1 else f"Mean and 95% bootstrap interval over {seeds} seeds."
    reached = any(name == "steps_to_90" for name, _, _ in table.columns(results))
    return found + " The dashed line marks 90% exact match." * reached


def _counted(pairs: Record) -> str:
    names = {"train": "training", "valid": "validation"}
    return ", ".join(f"{count:,} {names.get(name, name)}" for name, count in pairs.items())


def _result_table(results: Record) -> str:
    rows = [
        "".join(
            f"<td>{escape(cell.value)}{f'<small>{cell.interval}</small>' if cell.interval else ''}"
            "</td>"
            for cell in row
        )
        for row in table.rows(results)
    ]
    return _table(table.header(results), rows)


def _translations(outcomes: Sequence[Record]) -> str:
    """The first sentences of the test set, not chosen, with the words that went wrong marked."""
    parts = []
    for samples in zip(*(outcome["samples"] for outcome in outcomes), strict=True):
        target = samples[0]["target"]
        lines = {"source": " ".join(samples[0]["source"]), "reference": " ".join(target)}
        rows = [f"<td>{name}</td><td>{escape(text)}</td>" for name, text in lines.items()]
        for outcome, sample in zip(outcomes, samples, strict=True):
            marked = _marked(sample["translation"], target)
            rows.append(f"<td>{escape(outcome['score'])}</td><td>{marked}</td>")
        parts.append("".join(f"<tr>{row}</tr>" for row in rows))
    bodies = "".join(f"<tbody>{part}</tbody>" for part in parts)
    return f'<table class="text">{bodies}</table>'


def _marked(words: Sequence[str], reference: Sequence[str]) -> str:
    """Words as HTML, those that are not of the reference in a mark."""
    matcher = difflib.SequenceMatcher(a=reference, b=words, autojunk=False)
    right = {b + n for _, b, size in matcher.get_matching_blocks() for n in range(size)}
    return " ".join(
        escape(word) if n in right else f'<span class="wrong">{escape(word)}</span>'
        for n, word in enumerate(words)
    )


def _extra(results: Record) -> str:
    """A table for each further test set, such as sentences longer than any in training."""
    parts = []
    for name in results["mechanisms"][0]["extra"]:
        rows = []
        for mechanism in results["mechanisms"]:
            measured = mechanism["extra"][name]
            cells = (table.cell(measured[key], digits) for key, _, digits in _EXTRA)
            rows.append(
                f"<td>{escape(mechanism['score'])}</td>"
                + "".join(f"<td>{c.value}<small>{c.interval}</small></td>" for c in cells)
            )
        pairs = results["data"]["pairs"][name]
        text = _table(["score", *(title for _, title, _ in _EXTRA)], rows)
        about = f"<p class=soft>{_LONG}</p>" * (name == "long")
        parts.append(
            f"<h2>On “{escape(name)}”, {pairs:,} pairs</h2>{about}<div class=scroll>{text}</div>"
        )
    return "".join(parts)


def _comparison(results: Record) -> str:
    if not results["comparisons"]:
        return ""
    rows = ["".join(f"<td>{escape(text)}</td>" for text in row) for row in table.compared(results)]
    sentence = escape(results["comparisons"][0]["sentence"])
    return (
        f"<div class=scroll>{_table(table.compared_header(results), rows)}</div><p>{sentence}</p>"
    )


def _settings(values: Record) -> str:
    shown = {
        name: ", ".join(value) if isinstance(value, list) else str(value)
        for name, value in values.items()
        if value is not None
    }
    return "".join(
        f"<div><span>{escape(name)}</span><span>{escape(value)}</span></div>"
        for name, value in shown.items()
    )


def _table(header: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _inline(path: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
