"""The sweep over families of masks: shares of pairs, and the table of exponents."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from attention_jax import masks
from experiments.benchmark import accelerators, command_line, compilers, measure, patterns, programs
from experiments.benchmark.patterns import Point
from experiments.benchmark.run import run

LENGTH = 256


@pytest.mark.parametrize("name", ["longformer", "strided", "segment", "swin in order"])
def test_live_tiles_hold_all_that_is_allowed(name):
    mask = patterns.families(scale=8)[name].mask(LENGTH)
    allowed = patterns.allowed_share(mask, LENGTH)
    assert 0 < allowed <= patterns.live_share(mask, LENGTH) <= 1


def test_allowed_pairs_are_counted():
    for mask in (masks.Causal(), masks.Window(3, 1), np.arange(49).reshape(7, 7) % 3 == 0):
        counted = masks.as_mask(mask).to_dense(7).mean()
        assert patterns.allowed_share(mask, 7) == pytest.approx(float(counted))


def test_the_products_alone_are_those_of_attention():
    shape = programs.Shape(8, heads=2, depth=4)
    program = programs.products_alone(shape)
    query, key, value = programs.inputs(shape)
    expected = jnp.einsum("btnh,bsnh,bsnv->nbtv", query, key, value)[:, 0]
    np.testing.assert_allclose(jax.jit(program.function)(*program.arguments), expected, rtol=1e-4)


@pytest.mark.slow
def test_a_sweep_writes_tables_numbers_and_pictures_of_both_passes(tmp_path, monkeypatch, capsys):
    points = [Point(s, s**1.5, s / 64, 1.0, 0.5) for s in (64, 128, 256)]
    of_pass = {"causal": points, "swin": points}
    measured = dict.fromkeys(patterns.PASSES, of_pass)
    monkeypatch.setattr(patterns, "measure", lambda scale, repeats: measured)
    tmp_path /= "b[/x]"
    run(command_line.parse(["--suite=patterns", "--quick", f"--out={tmp_path}"]))
    printed = capsys.readouterr().out
    assert printed.count("| causal |") == 2
    assert printed.endswith(f"results in {tmp_path}/\n")
    passes = json.loads((tmp_path / "patterns.json").read_text())["passes"]
    assert passes["forward and backward pass"]["swin"][1] == points[1]._asdict()
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert len(pictures) == 4 and "patterns_forward_pass_milliseconds.png" in pictures
    assert (tmp_path / "patterns.md").read_text().count("| swin |") == 2


def test_the_table_gives_exponents_and_what_the_longest_length_costs():
    """Work like S^2, time like S^1.5 and bytes like S, by construction."""
    points = [Point(s, s**1.5, s / 64, 1.0, 0.5) for s in (64, 128, 256)]
    of_pass = dict.fromkeys(patterns.families(scale=8), points)
    report = patterns.report(dict.fromkeys(patterns.PASSES, of_pass), 8, "a machine")
    assert "## Forward and backward pass\n\n| family |" in report
    lines = report.split("|---|\n")[1].split("\n\n")[0].splitlines()
    assert len(lines) == len(of_pass)
    causal = next(line for line in lines if line.startswith("| causal |"))
    assert causal == "| causal | `Causal()` | 50 | 100 | 2.00 | 4.1e+03 | 1.50 | 4 | 1.00 |"
    assert "`Prefix(32) \\| Causal()`" in lines[2], "a | inside a cell is escaped"


@pytest.fixture
def kept_programs(tmp_path):
    """A folder that keeps every compiled program."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_a_compilation_that_is_measured_is_one(kept_programs):
    program = measure.Program(lambda x: x @ jnp.sin(x), (np.ones((3, 3), np.float32),))
    measure.compiled(program)
    (kept,) = kept_programs.glob("*-cache")
    kept.unlink()
    assert measure.compile_seconds(program)().wall > 0
    assert not list(kept_programs.glob("*-cache")), "the folder is no part of what is measured"
    jax.clear_caches()
    measure.compiled(program)
    assert list(kept_programs.glob("*-cache")) == [kept], "others are kept as before"


def test_accelerators_without_compilers_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compilers, "lacks", lambda name: f"compiling for {name} needs a compiler")
    run(command_line.parse(["--suite=accelerators", "--quick", f"--out={tmp_path}"]))
    printed = capsys.readouterr().out
    report = (tmp_path / "accelerators.md").read_text(encoding="utf-8")
    for target in accelerators.COMPILED_FOR:
        assert f"| {target} | all |  | forward | compiling for {target} needs a" in printed
        assert f"compiling for {target} needs a compiler" in report
    assert "run on none" in report
    assert len(json.loads((tmp_path / "accelerators.json").read_text())["rows"]) == 2


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    assert compilers.lacks("v5e") == (
        "compiling for v5e needs libtpu: pip install 'attention_jax[aot]'"
    )
    assert compilers.lacks("H100") == (
        "compiling for H100 needs jax_cuda12_plugin: pip install jax-cuda12-plugin jax-cuda12-pjrt "
        "nvidia-cuda-nvcc-cu12"
    )


def test_programs_are_timed_and_their_tables_have_times():
    seconds = accelerators.duration(lambda x: x + 1.0, [jnp.ones(4)], repeats=3)
    assert seconds > 0.0
    row = accelerators.Row("H200", "mha", "causal", True, milliseconds=1.5, teraflops=250.0)
    assert accelerators.table([row]).splitlines()[2] == (
        "| H200 | mha | causal | gradients |  |  |  | 1.5 | 250 |"
    )


def test_traffic_leaves_out_other_memory_and_knows_no_loops():
    program = """
ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %near = (bf16[8,128]{1,0:S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %there = bf16[8,128]{1,0:S(1)} copy-done(%near)
  ROOT %y = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%there, /*index=1*/%x), target="a(b)"
}
"""
    assert compilers.traffic(program) == 3 * 2048
    assert compilers.traffic(program.replace("custom-call", "while")) is None
