"""The sweep over families of masks: shares of pairs, and the table of exponents."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from attention_jax import masks
from experiments.benchmark import (
    accelerators,
    command_line,
    compilers,
    inside,
    matrix,
    measure,
    patterns,
    peers,
    programs,
    schedule,
)
from experiments.benchmark.patterns import Point
from experiments.benchmark.run import run
from experiments.command_line import UsageError
from tests.contract import examples
from tests.statistics.examples import STATISTICS

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
    assert report.endswith("## Static schedule\n\nNot read: compiling for v5e needs a compiler.\n")


def test_the_matrix_without_compilers_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compilers, "lacks", lambda name: f"compiling for {name} needs a compiler")
    run(command_line.parse(["--suite=matrix", "--quick", f"--out={tmp_path}"]))
    said = "0 of 360 programs were compiled, and none was run. compiling for v4 needs a compiler."
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "matrix.md").read_text(encoding="utf-8")


def test_a_matrix_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    asked = []
    cost = compilers.Cost(1.0, 100, 100, 10, traffic=190, copied=0)
    monkeypatch.setattr(matrix, "measure", lambda cell: asked.append(cell) or cost)
    first, second, *_ = matrix.cells()
    file = tmp_path / "matrix.jsonl"
    assert list(matrix.resumed(file, [first])) == [(first, cost)]
    assert list(matrix.resumed(file, [first, second])) == [(first, cost), (second, cost)]
    assert asked == [first, second]


def test_what_is_beyond_its_bounds_is_said_with_its_figure():
    cell = matrix.Cell("v5e", "scaled dot", "none", True)
    cost = compilers.Cost(21.0, 100, 100, 10**9, traffic=320, copied=7)
    assert matrix.beyond(cell, cost) == [
        "compiled in 21 of at most 20 s",
        "traffic 1.6 of at most 1.3 times operands",
        "copies of layouts 7 of at most 0 bytes",
    ]
    assert matrix.beyond(cell._replace(is_gradient=False), cost)[-1].startswith("temporaries 1e+09")
    assert "| v5e | scaled dot | gradients | none | 21.0 |" in matrix.table([(cell, cost)])


def test_libraries_that_are_missing_or_have_no_gpu_are_a_sentence(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert [peers.lacks(name) for name in ("cudnn", "tokamax", "FlexAttention")] == [
        None,
        "not installed: pip install tokamax",
        "not installed: pip install torch",
    ]
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert peers.lacks("FlexAttention") == "not run: no GPU"
    said = peers.why("tokamax", NotImplementedError("Not supported on cpu."))
    assert said == (
        'not compiled: tokamax needs the device in this process and says "Not supported on cpu."'
    )


SCHEDULE = """\
     0   :  { %a = start } /* entry bundle: %x = custom-call(%y) */
   0x1 LB: > { %b = step } /* Start region 1 */
   0x2   : > { sbr.rel (%p1) target = $region2 }
{tile}
   0x9   : > { %c = next } /* Start/End empty region 2 */
   0xa   : > { sbr.rel (!%p2) target = $region1 }
"""


def test_a_schedule_counts_blocks_as_often_as_they_are_executed():
    tile = "\n".join(f"   0x3   : > {{ %t{n} = work }}" for n in range(700))
    text = SCHEDULE.replace("{tile}", tile)
    trips = schedule.Trips(steps=5, rows=2, masked=2, unmasked=1)
    assert schedule.bundles(text, trips) == 701 * 3 + 2 * 5
    with pytest.raises(ValueError, match="1 to 3 blocks that compute tiles, got 0"):
        schedule.bundles(SCHEDULE.replace("{tile}", ""), trips)


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    assert compilers.lacks("v5e") == (
        "compiling for v5e needs libtpu: pip install 'attention_jax[aot]'"
    )
    assert compilers.lacks("H100") == (
        "compiling for H100 needs jax_cuda12_plugin: pip install 'attention_jax[aot-gpu]'"
    )


def test_a_compiler_that_jax_left_out_is_said_to_need_the_environment(monkeypatch):
    def left_out(name):
        raise NotImplementedError(f"topology not implemented for {name}")

    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(compilers, "_device", left_out)
    assert compilers.lacks("H100") == (
        "compiling for H100 without a GPU needs JAX_PLATFORMS=cpu in the environment"
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


def test_every_normalizer_and_every_statistic_is_measured():
    not_of_rows = {"contextual_positions", "hard_monotonic", "monotonic"}
    assert inside.normalizer_cases(64).keys() == examples.NORMALIZERS.keys() | not_of_rows
    others = {inside.ALONE, inside.LOGGED, inside.ALL}
    assert inside.statistic_cases(64).keys() - others == STATISTICS.keys()


def test_tables_of_normalizers_and_statistics_are_pages(tmp_path, monkeypatch, capsys):
    ratio, mebibytes = inside.Ratio(1.5, 1.25, 2.0), {"forward": 4.0, "with gradients": 9.5}
    row = inside.Row(dict.fromkeys(inside.PASSES, ratio), mebibytes, 2e-15, 3e-14)
    monkeypatch.setattr(inside, "measure", lambda cases_of, *_: dict.fromkeys(cases_of(64), row))
    long = dict.fromkeys(inside.statistic_cases(64), inside.Long(3.25, 40.0))
    monkeypatch.setattr(inside, "at_length", lambda scale: long)
    run(command_line.parse(["--suites=normalizers,statistics", "--quick", f"--out={tmp_path}"]))
    cells = "1.50 (1.25 to 2.00) | 1.50 (1.25 to 2.00) | 4.0 | 9.5 | 2e-15 | 3e-14 |"
    of_normalizers, of_statistics = (
        (tmp_path / f"{name}.md").read_text() for name in ("normalizers", "statistics")
    )
    assert f"| `stick_breaking` | {cells}\n" in of_normalizers
    assert f"| `heaviest` | {cells} 3.2 | 40 |\n" in of_statistics
    assert f"| {inside.ALONE} | {cells}" in capsys.readouterr().out
    written = json.loads((tmp_path / "statistics.json").read_text())
    assert written["long"]["entropy"] == {"seconds": 3.25, "mebibytes": 40.0}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_costs_and_errors_are_of_data_of_their_own_lengths():
    def few(length):
        cases = inside.statistic_cases(length)
        return {name: cases[name] for name in (inside.ALONE, "induction_score")}

    row = inside.measure(few, scale=32, repeats=1)["induction_score"]
    assert all(ratio.median > 0 for ratio in row.ratios.values())
    assert row.error_of_values < 1e-12 and row.error_of_gradients < 1e-12


def test_errors_are_relative_to_numbers_beyond_one_and_alike_where_infinite():
    theirs = np.array([-np.inf, 0.5, 100.0])
    assert inside.largest(theirs, theirs) == 0.0
    assert inside.largest(theirs + np.array([0.0, 0.25, 50.0]), theirs) == 0.5
    assert np.isnan(inside.largest(theirs * np.nan, theirs))


def test_data_that_no_suite_reads_are_refused(tmp_path):
    flags = [f"--data={tmp_path}", f"--out={tmp_path}"]
    with pytest.raises(
        UsageError,
        match=r"^--data is for the suite translate, which --suites does not name; add it, or leave "
        r"--data out\.$",
    ):
        command_line.parse(["--suites=memory,compile", *flags])
    for suites in ("memory,translate", "all"):
        assert command_line.parse([f"--suites={suites}", *flags]).data == str(tmp_path)
