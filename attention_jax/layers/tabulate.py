"""Masks and bound functions in the tables that Flax draws (`nnx.tabulate`, `linen.tabulate`).

Flax writes what modules take and return as YAML, which knows neither; imported, this module has
them written as `repr` does.
"""

from __future__ import annotations

import yaml
from jax.tree_util import Partial

from attention_jax.base.binding import Sliced
from attention_jax.masks import Mask


def _as_printed(dumper: yaml.SafeDumper, value: Mask | Partial) -> yaml.ScalarNode:
    return dumper.represent_str(repr(value))


def _of_every_head(dumper: yaml.SafeDumper, value: Sliced) -> yaml.ScalarNode:
    return dumper.represent_str(f"Sliced({value.function!r}, {value.axes!r})")


yaml.SafeDumper.add_multi_representer(Mask, _as_printed)
yaml.SafeDumper.add_multi_representer(Partial, _as_printed)
yaml.SafeDumper.add_multi_representer(Sliced, _of_every_head)
