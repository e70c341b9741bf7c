"""Programs compiled for four chips of a TPU v5e that are not there; print what was read from them.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m tests.parallel.tpu_cases

prints a line of JSON for each case. Nothing runs: the compiler does all but that.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax import attend, masks, parallel

TOPOLOGY = "v5e:2x2"
LENGTH, TILE = 1024, (128, 128)
START = re.compile(r"%(collective-permute-start[\w.]*) = ")
DONE = re.compile(r"collective-permute-done\(.*?%(collective-permute-start[\w.]*)\)")
EXCHANGE = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def meshes():
    """Return the chips as a mesh of two axes, and as one of one axis."""
    chips = np.array(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices)
    return (
        Mesh(chips.reshape(2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2),
        Mesh(chips.ravel(), ("sp",), axis_types=(AxisType.Auto,)),
    )


def compiled(function, mesh, arrays, specs):
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    traced = jax.jit(function, in_shardings=shardings).trace(*arrays)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def waits(text):
    """Say for each transfer of keys whether a loop over tiles runs between its start and its end.

    The text is the schedule: operations start in the order in which they stand.
    """
    assert "is_scheduled=true" in text
    found, open_since = [], {}
    for line in text.splitlines():
        if line.rstrip().endswith("{"):  # another computation
            open_since = {}
        elif START.search(line):
            open_since[START.search(line)[1]] = False
        elif DONE.search(line):
            found.append(open_since.pop(DONE.search(line)[1]))
        elif " while(" in line:
            open_since = dict.fromkeys(open_since, True)
    return found


def with_gradients(function, *arrays):
    context, backward = jax.vjp(function, *arrays)
    return context, backward(context)


def of_segments(query, key, value, segment):
    mask = masks.Causal() & masks.Segment(segment)
    function = functools.partial(attend, mask=mask, implementation="tiled", tile_sizes=TILE)
    return with_gradients(function, query, key, value)


def main():
    both, one = meshes()
    x = jax.ShapeDtypeStruct((2, LENGTH, 2, 64), jnp.bfloat16)
    segment = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    split = P("data", None, "heads")
    text = compiled(of_segments, both, (x, x, x, segment), (split,) * 3 + (P("data"),)).as_text()
    whole = compiled(lambda x: x.sum(0), both, (x,), (split,)).as_text()
    for name, found in (("automatic", text), ("a sum over examples", whole)):
        print(json.dumps({"name": name, "exchanges": EXCHANGE.findall(found)}), flush=True)
    order = parallel.deal(masks.Causal(), LENGTH, 4)
    ring = functools.partial(
        parallel.attend,
        axis="sp",
        method="ring",
        mesh=one,
        mask=masks.Causal(),
        order=order,
        tile_sizes=TILE,
    )
    for name, function in (
        ("ring", ring),
        ("ring, gradients", functools.partial(with_gradients, ring)),
    ):
        program = compiled(function, one, (x, x, x), (P(None, "sp"),) * 3)
        print(json.dumps({"name": name, "waits": waits(program.as_text())}), flush=True)


if __name__ == "__main__":
    main()
