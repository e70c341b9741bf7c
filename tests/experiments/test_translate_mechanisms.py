"""A score of the user's own is asked once, abstractly, before anything is written."""

import jax.numpy as jnp
import pytest

from attention_jax.base.parameters import Parameter, learned
from experiments.command_line import UsageError
from experiments.translate.config import Config
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
