"""Fast memory: what Linux and JAX tell of it, and what is taken where they do not."""

import types

import jax
import pytest

from attention_jax.implementations import machine, tiles
from attention_jax.masks import Full

MEBIBYTE = 2**20


def caches(folder, *entries):
    """Write caches of the first core: level, type, size and the cores that share it."""
    for number, entry in enumerate(entries):
        cache = folder / "cpu0" / "cache" / f"index{number}"
        cache.mkdir(parents=True)
        names = "level", "type", "size", "shared_cpu_map"
        for name, text in zip(names, entry, strict=True):
            (cache / name).write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([(1, "Data", "48K", "1"), (2, "Unified", "2048K", "1")], 2 * MEBIBYTE),
        ([(2, "Unified", "2M", "00000000,00010001")], MEBIBYTE),
        ([(3, "Unified", "32768K", "3")], machine.LEVEL_2),
        ([(2, "Unified", "unknown", "1")], machine.LEVEL_2),
        ([(2, "Unified", "512K", "0")], machine.LEVEL_2),
        ([(2, "Unified", "512K", "no number")], machine.LEVEL_2),
        ([], machine.LEVEL_2),
    ],
    ids=["own", "of two threads", "none", "no size", "of nobody", "no map", "no folder"],
)
def test_the_level_2_cache_of_a_core(tmp_path, entries, expected):
    assert machine.level_2(caches(tmp_path, *entries)) == expected


@pytest.mark.parametrize(
    ("cores", "cache", "expected"),
    [
        (2, 2**20, 2**19),
        (2, 2**21, 2**20),
        (1, 2**15, 2**18),
        (3, 2**20, 2**19),
        (128, 2**21, 2**21),
    ],
)
def test_tiles_that_are_visited_together_fill_the_caches_of_all_cores(cores, cache, expected):
    assert machine.pairs_of(cores, cache) == expected


@pytest.mark.parametrize(("pairs", "rows"), [(2**18, 512), (2**19, 1024), (2**20, 2048)])
def test_products_of_a_visit_grow_with_the_caches(monkeypatch, pairs, rows):
    monkeypatch.setattr(machine, "pairs_of_cpu", lambda: pairs)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    (visits,) = tiles.make_plan(Full(), (4096, 4096), (512, 512)).visits
    assert (visits.rows, visits.together) == (rows, 1)


@pytest.mark.parametrize(
    ("backend", "kinds", "expected"),
    [
        ("tpu", ["TPU v5 lite", "TPU v5 lite"], 128),
        ("tpu", ["TPU v5p"], 64),
        ("tpu", ["TPU v4"], 16),
        ("tpu", ["a later one"], 16),
        ("cpu", ["cpu"], 128),
    ],
)
def test_the_vector_memory_is_that_of_the_generation(monkeypatch, backend, kinds, expected):
    devices = [types.SimpleNamespace(device_kind=kind) for kind in kinds]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert machine.vector_memory() == expected * MEBIBYTE
    assert machine.pairs_at_once("tpu") == expected * MEBIBYTE // machine.BYTES_A_PAIR
