"""report.html: a whole run in one self-contained file."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from attention_jax.diagnostics import Explorer
from experiments import pages
from experiments.files import write_text
from experiments.translate import table
from experiments.translate.checks import OF_MODEL
from experiments.translate.config import Config
from experiments.translate.workdir import Record

_BODY = Template("""<p class="lead">$lead</p>

<h2>Result</h2>
<div class="scroll">$table</div>
<p class="soft">$legend</p>
$comparison

<h2>Learning curves</h2>
<figure><img alt="Learning curves" src="$curves">
<figcaption>On the validation set. $bands</figcaption></figure>

$explorer

<h2>Alignments</h2>
<p class="soft">Attention weights of the translator of seed 0 while it reads the reference: rows are
target words, columns source words, from 0 (white) to 1 (dark blue). &lt;eos&gt; is the end of the
sentence.$gold</p>
$alignments

<h2>Translations</h2>
<p class="soft">The first sentences of the test set; translations of seed 0, with words marked that
differ from the reference.</p>
<div class="scroll">$translations</div>

$extra

<h2>Data</h2>
<p>$data</p>
$notices

<h2>Reproduce</h2>
<pre>$command</pre>
$settings""")

_EXTRA = (
    ("exact_match", "exact match %", 1),
    ("token_accuracy", "token acc. %", 1),
    ("bleu", "BLEU", 1),
    ("chrf", "chrF", 1),
    ("alignment_error", "AER %", 1),
)
_EXPLORE = (
    "Attention weights of sentences of the validation set while their references are read, after "
    "each validation. Underlined words and framed cells are sure links of the gold alignment, if "
    "there is one."
)
_LONG = "Sentences longer than any in training."
_GOLD = (
    " Frames are gold links (dotted: possible links). These are the sentences of readable length "
    "with the most reordering."
)


def write(
    results: Record,
    outcomes: Sequence[Record],
    figures: Sequence[str],
    folder: Path,
    explorer: Explorer | None = None,
) -> Path:
    """Write the report and return its path."""
    scores = [outcome["score"] for outcome in outcomes]
    data, config = results["data"], results["config"]
    body = _BODY.substitute(
        lead=escape(
            f"{_subject(scores)}, trained on {data['pairs']['train']:,} sentence pairs "
            f"({data['name']}) in {config['steps']:,} steps, "
            f"{config['seeds']} seed{'s' * (config['seeds'] > 1)} each."
        ),
        table=_result_table(results),
        legend=escape(_legend(results)),
        comparison=_comparison(results),
        curves=pages.inline(folder / "figures" / "learning_curves.svg"),
        bands=escape(_bands(results)),
        explorer=_explored(explorer),
        gold=_GOLD if outcomes[0]["pictures"][0]["gold"] else "",
        alignments="".join(
            f'<figure><img alt="{name}" src="{pages.inline(folder / "figures" / f"{name}.svg")}">'
            "</figure>"
            for name in figures
            if name.startswith("alignment")
        ),
        translations=_translations(outcomes),
        extra=_extra(results),
        command=escape(command(config)),
        data=escape(
            f"{data['name']}: {_counted(data['pairs'])} pairs; {data['source_words']:,} source "
            f"and {data['target_words']:,} target words in the vocabularies."
        ),
        notices="".join(f"<p class='soft'>{escape(n)}</p>" for n in data["notices"]),
        settings=pages.settings({**_settings(config), **results["environment"]}),
    )
    path = folder / "report.html"
    title = " against ".join(scores[:2]) if len(scores) == 2 else ", ".join(scores)
    write_text(path, pages.page(title, body))
    return path


def _explored(explorer: Explorer | None) -> str:
    if explorer is None:
        return ""
    return f"<h2>Explore</h2>\n<p class='soft'>{_EXPLORE}</p>\n{explorer.fragment()}"


def command(config: Record, program: str = "experiments.translate") -> str:
    """Return the command line of a run, with the flags that differ from their defaults."""
    plain = Config().identity
    flags = [
        f"--{name}={','.join(value) if isinstance(value, list) else value}"
        for name, value in config.items()
        if value != plain[name]
    ]
    return shlex.join(["python", "-m", program, *flags])


def _settings(config: Record) -> Record:
    """Return the fields of a run without those of the other architecture."""
    unknown = {
        name for model, names in OF_MODEL.items() if model != config["model"] for name in names
    }
    return {name: value for name, value in config.items() if name not in unknown}


def _subject(scores: Sequence[str]) -> str:
    if len(scores) == 1:
        return f"A translator {'without' if scores[0] == 'none' else 'with'} attention"
    return "Translators that differ only in the score of their attention"


def _legend(results: Record) -> str:
    """Explain the columns of the result."""
    names = {name for name, _, _ in table.columns(results)}
    parts = [
        f"Test set of {results['data']['pairs']['test']:,} pairs, {table.decoding(results)}.",
        f"{table.over_seeds(results)}.",
        "Valid loss is the cross-entropy of a token of the validation set, in nats.",
        "Exact match is the share of sentences with every word right.",
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
    return pages.table(table.header(results), rows)


def _translations(outcomes: Sequence[Record]) -> str:
    """Return a table of the first test sentences, with wrong words marked."""
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
    """Return words as HTML, those that differ from the reference marked."""
    matcher = difflib.SequenceMatcher(a=reference, b=words, autojunk=False)
    right = {b + n for _, b, size in matcher.get_matching_blocks() for n in range(size)}
    return " ".join(
        escape(word) if n in right else f'<span class="wrong">{escape(word)}</span>'
        for n, word in enumerate(words)
    )


def _extra(results: Record) -> str:
    """Return a table for each further test set, such as sentences longer than any in training."""
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
        text = pages.table(["score", *(title for _, title, _ in _EXTRA)], rows)
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
    found = pages.table(table.compared_header(results), rows)
    return f"<div class=scroll>{found}</div><p>{sentence}</p>"
