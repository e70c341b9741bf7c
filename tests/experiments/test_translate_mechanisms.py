"""A score of the user's own is asked once, abstractly, before anything is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import scores
from attention_jax.base.parameters import Parameter, bind_parameters, initialize, learned
from experiments.command_line import UsageError
from experiments.translate.command_line import parse
from experiments.translate.config import Config
from experiments.translate.mechanisms import between_projections, score_of
from experiments.translate.prepare import sizes_of


def halved_dot(query, key):
    return 0.5 * query @ key.T


def sum_of_rows(query, key):
    return jnp.sum(query) + jnp.sum(key)


def words_of_rows(query, key):
    return "logits"


weighted_dot = learned(
    lambda query, key, weight: (query * weight[None, :]) @ key.T,
    weight=Parameter((4,), lambda key, shape, dtype: jnp.ones(shape, dtype)),
)


@pytest.mark.parametrize("model", ["bigru", "transformer"])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("math.pi", "but it raises TypeError: "),
        ("json.dumps", "but it raises TypeError: dumps() takes 1 positional argument but 2 were"),
        ("os.path.join", "but it raises TypeError: "),
        (f"{__name__}.sum_of_rows", "[2, 4] are needed, but it returns []."),
        (f"{__name__}.words_of_rows", "but it raises TypeError: "),
    ],
)
def test_what_is_no_score_is_refused(model, name, sentence):
    config = Config(scores=("dot", name), model=model, width=8)
    with pytest.raises(UsageError) as error:
        sizes_of(config, 9, 9)
    depth = 8 if model == "bigru" else 2
    told = str(error.value)
    assert told.startswith(
        f"--scores: {name} is no score: for a query [2, {depth}] and keys [4, {depth}] logits "
    )
    assert sentence in told and "\n" not in told


@pytest.mark.parametrize("name", ["halved_dot", "weighted_dot"])
@pytest.mark.parametrize("switches", [{}, {"qk_norm": True}, {"projections": "tied"}])
def test_a_score_of_the_users_own_has_sizes(name, switches):
    name = f"{__name__}.{name}"
    config = Config(scores=(name,), width=8, attention_size=4, **switches)
    assert sizes_of(config, 9, 9)[name].width == 8


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no.such.module", "ModuleNotFoundError: No module named 'no'"),
        ("math.tau_", "AttributeError: module 'math' has no attribute 'tau_'"),
    ],
)
def test_what_cannot_be_imported(name, reason):
    with pytest.raises(UsageError) as error:
        sizes_of(Config(scores=(name,)), 9, 9)
    assert str(error.value) == f"--scores: {name} cannot be imported: {reason}."


def test_a_module_that_fails_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "failing_module.py").write_text("raise ValueError('first\\nsecond')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError) as error:
        sizes_of(Config(scores=("failing_module.score",)), 9, 9)
    assert str(error.value) == (
        "--scores: failing_module.score cannot be imported: ValueError: first."
    )


def test_nothing_is_written_for_what_is_no_score(tmp_path, translate, capsys):
    small = ("--data=copy", "--train_size=90", "--valid_size=9", "--test_size=9")
    flags = (*small, "--scores=math.pi", f"--workdir={tmp_path}/run")
    assert translate(*flags) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("translate: --scores: math.pi is no score: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_score_between_projections_is_the_score_of_projected_rows():
    asked = between_projections(scores.cosine, 3, 4, 5)
    values = initialize(jax.random.key(0), dict(asked.parameters))
    query, key = jnp.ones((2, 3)), jax.random.normal(jax.random.key(1), (6, 4))
    score = bind_parameters(asked, values)
    projected = query @ values["query_matrix"], key @ values["key_matrix"]
    expected = scores.cosine(*projected, temperature=values["temperature"])
    np.testing.assert_allclose(score(query, key), expected, rtol=1e-5)
    np.testing.assert_allclose(scores.separate(score)(query, key), expected, rtol=1e-5)


def test_a_score_of_ones_own_is_named_by_its_path():
    score = score_of("experiments.translate.mechanisms.uniform", 6, 6, 5)
    assert {p.shape for p in score.parameters.values()} == {(6, 5)}
    with pytest.raises(UsageError, match=r"--scores: no\.such\.score cannot be imported: .*"):
        score_of("no.such.score", 6, 6, 5)


UNTIEABLE = ("bilinear", "concat", "location", "shared_projection")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["additive", "cosine", "low_rank_bilinear"])
def test_tied_projections_are_equal_projections(name):
    rows = jax.random.normal(jax.random.key(2), (7, 6))
    query, key = rows[:3], rows[3:]
    tied = score_of(name, 6, 6, 5, tied=True)
    values = initialize(jax.random.key(1), dict(tied.parameters))
    untied = score_of(name, 6, 6, 5)
    (added,) = set(untied.parameters) - set(values)
    both = {**values, added: values[added.replace("key", "query")]}
    expected = bind_parameters(untied, both)(query, key)
    np.testing.assert_array_equal(bind_parameters(tied, values)(query, key), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dot", "additive", "bilinear"])
def test_normed_rows_have_no_length(name):
    normed = score_of(name, 6, 6, 5, normed=True)
    values = initialize(jax.random.key(1), dict(normed.parameters))
    if name == "additive":
        values["value"] += 1
    score = bind_parameters(normed, values)
    query, key = jax.random.normal(jax.random.key(2), (2, 4, 6))
    logits = score(query, key)
    np.testing.assert_allclose(score(3 * query, 0.5 * key), logits, rtol=1e-4, atol=1e-5)
    plain = bind_parameters(
        score_of(name, 6, 6, 5), {k: v for k, v in values.items() if not k.endswith("_gain")}
    )
    assert jnp.any(jnp.abs(plain(query, key) - logits) > 1e-2)
    if name == "dot":
        rows = [query @ values["query_matrix"], key @ values["key_matrix"]]
        rows = [x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True)) for x in rows]
        np.testing.assert_allclose(logits, rows[0] @ rows[1].T, rtol=1e-4, atol=1e-4)


def test_scores_that_have_nothing_to_tie_or_to_norm_are_refused():
    for name in UNTIEABLE:
        sentence = f"--projections=tied: {name} has no two projections to tie."
        with pytest.raises(UsageError, match=sentence):
            parse([f"--scores=dot,{name}", "--projections=tied"])
    with pytest.raises(UsageError, match="--qk_norm: location does not depend on keys"):
        parse(["--scores=location", "--qk_norm"])
    with pytest.raises(UsageError, match=r"scores\.bilinear has no two projections to tie"):
        score_of("attention_jax.scores.bilinear", 6, 6, 5, tied=True)
    controls = parse(["--scores=uniform,none", "--projections=tied", "--qk_norm"])
    assert controls.scores == ("uniform", "none")
