"""What the flags of a run must not say, alone and together.

This module does not import JAX, so that a mistyped flag is answered at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments import processes
from experiments.command_line import UsageError
from experiments.data.load import GENERATED

SCORES = (
    "additive",
    "bilinear",
    "concat",
    "cosine",
    "dot",
    "gaussian",
    "key_normalized_dot",
    "location",
    "low_rank_bilinear",
    "normalized_additive",
    "scaled_dot",
    "shared_projection",
    "trilinear",
)
CONTROLS = ("uniform", "none")
# Scores that do not have one projection of the query and one of the key.
_UNTIEABLE = ("bilinear", "concat", "location", "shared_projection")

# Flags of some modes only.
_MODES = {
    "split": ("evaluate",),
    "references": ("evaluate",),
    "comet": ("evaluate",),
    "input": ("evaluate", "translate", "score"),
    "alignments": ("translate", "score"),
    "pictures": ("translate", "score"),
    "translator": ("translate", "score"),
    "ensemble": ("evaluate", "translate", "score"),
    "members": ("evaluate", "translate", "score"),
    "open": ("train",),
    "coordinator": ("train",),
    "processes": ("train",),
    "process": ("train",),
}

# Flags of data in files only.
_OF_FILES = ("source", "target", "min_count", "max_vocabulary", "lowercase", "words", "links_from")

# Flags of one architecture only.
OF_MODEL = {
    "bigru": ("query", "bridge"),
    "transformer": ("heads", "layers", "positions"),
}


def check(config: Any) -> None:
    """Refuse a `Config` with values that cannot be used.

    Raises:
      UsageError: one sentence with flag, value and what is needed.
    """
    for field in dataclasses.fields(config):
        value, range = getattr(config, field.name), field.metadata["range"]
        if range and value is not None and not range.contains(value):
            raise UsageError(f"--{field.name} is {value}, but {range.words} is needed.")
    for name, modes in _MODES.items():
        field = config.__dataclass_fields__[name]
        if config.mode not in modes and getattr(config, name) != field.default:
            raise UsageError(f"--{name} is for --mode={' or '.join(modes)}; leave it out.")
    if config.translator >= config.seeds:
        raise UsageError(f"--translator is {config.translator}, but the seeds are {config.seeds}.")
    if config.members and not config.ensemble:
        raise UsageError("--members is for an --ensemble; give both, or leave it out.")
    if config.translator and config.ensemble:
        raise UsageError("--translator is one of the --ensemble; leave one of them out.")
    processes.check(config.coordinator, config.processes, config.process)
    _check_data(config)
    _check_model(config)
    if not config.scores:
        raise UsageError("--scores is empty; name at least one score.")
    if "" in config.scores:
        raise UsageError("--scores has an empty name; put one comma between two names.")
    for name in config.scores:
        if config.scores.count(name) > 1:
            raise UsageError(f"--scores names {name} twice; name every score once.")
        if name not in SCORES + CONTROLS and not _is_path(name):
            raise UsageError(
                f"--scores: there is no score {name!r}; choose from "
                f"{', '.join(SCORES + CONTROLS)}, or give package.module.function."
            )
        if config.projections == "tied" and config.model == "bigru" and name in _UNTIEABLE:
            raise UsageError(f"--projections=tied: {name} has no two projections to tie.")
        if config.guided_alignment and name == "none":
            raise UsageError("--guided_alignment: none has no attention to guide.")
        if config.qk_norm and name == "location":
            raise UsageError("--qk_norm: location does not depend on keys; leave it out.")


def _check_data(config: Any) -> None:
    """Refuse flags of data in files for generated data.

    After training, the folder of the run has the data flags.
    """
    if config.mode != "train" or config.data not in GENERATED:
        return
    for name in _OF_FILES:
        if name == "max_vocabulary" and config.has_subwords:
            continue
        if getattr(config, name) != config.__dataclass_fields__[name].default:
            raise UsageError(
                f"--{name} is for data in files, and {config.data} is generated; leave it out."
            )


def _check_model(config: Any) -> None:
    """Refuse flags of the other architecture."""
    other = "bigru" if config.model == "transformer" else "transformer"
    for name in OF_MODEL[other]:
        if getattr(config, name) != config.__dataclass_fields__[name].default:
            raise UsageError(f"--{name} is for --model={other}; leave it out.")
    if config.model != "transformer":
        return
    if "none" in config.scores:
        raise UsageError(
            "--scores: none is for --model=bigru, whose decoder starts from the encoder's "
            "state; a Transformer sees the source only through attention."
        )
    if config.width % config.heads:
        raise UsageError(f"--heads is {config.heads}, but a divisor of {config.width} is needed.")
    if config.positions == "rotary" and config.head_size % 2:
        raise UsageError(
            f"--positions=rotary turns pairs, but a head has depth {config.head_size}; choose "
            "an even --attention_size."
        )


def _is_path(name: str) -> bool:
    """Whether a name may be package.module.function."""
    return "." in name and all(part.isidentifier() for part in name.split("."))
