"""Small translators of the generated grammar, recurrent or Transformers, and their BLEU.

Models that several claims need are trained once in a run of the program.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax import masks
from attention_jax.nnx import AdditiveAttention, EncoderDecoder, MultiHeadAttention
from experiments import metrics
from experiments.claims.claim import Data, Setting
from experiments.claims.training import Arm, Trained, arm_of, graph_of, merged, train
from experiments.data import Sizes as SplitSizes
from experiments.data import load
from experiments.data.batches import pad
from experiments.data.corpus import Pair
from experiments.data.vocabulary import BOS, PAD, Vocabulary
from experiments.translate import decode
from experiments.translate.model import Sizes, Translator, token_losses

Array = jax.Array
SCORES = ("dot", "scaled_dot", "additive")
WIDTH = 32
_BATCH = 32


class Text(NamedTuple):
    """Encoded pairs: source [n, S] and target [n, T], both with an end symbol and padding.

    Training draws its batches from the first `size` pairs.
    """

    source: Array
    target: Array
    size: Array


class Material(NamedTuple):
    """Training text, held-out text, and the test pairs as text and as words."""

    train: Text
    valid: Text
    test: Text
    pairs: tuple[Pair, ...]
    source_vocabulary: Vocabulary
    target_vocabulary: Vocabulary


@functools.cache
def material(setting: Setting, name: str = "grammar", longest: int = 10) -> Material:
    """Generate a corpus of sentences of at most `longest` words."""
    sizes = setting.pick(tiny=(200, 20, 20), quick=(6000, 200, 200), full=(20000, 500, 500))
    corpus = load(name, sizes=SplitSizes(*sizes), max_length=longest)
    vocabularies = corpus.source_vocabulary, corpus.target_vocabulary
    splits = corpus.train, corpus.valid, corpus.test
    sides = [
        [vocabulary.encode(getattr(pair, side)) for pairs in splits for pair in pairs]
        for side, vocabulary in zip(("source", "target"), vocabularies, strict=True)
    ]
    source, target = (pad(of_side, 1 + max(map(len, of_side))) for of_side in sides)
    ends = np.cumsum([0, *map(len, splits)])
    train, valid, test = (
        Text(jnp.asarray(source[a:b]), jnp.asarray(target[a:b]), jnp.int32(b - a))
        for a, b in itertools.pairwise(ends)
    )
    return Material(train, valid, test, corpus.test, *vocabularies)


def batch(rng: Array, text: Text) -> tuple[Array, Array]:
    """Draw pairs with replacement."""
    rows = jax.random.randint(rng, (_BATCH,), 0, text.size)
    return text.source[rows], text.target[rows]


def recurrent(
    given: Material,
    score: str,
    attention_size: int = WIDTH,
    normalizer: Callable[..., Any] | None = None,
) -> Model:
    """Return a recurrent translator that differs from others in its score alone.

    With a normalizer the score is the additive one, and only the normalizer differs.
    """
    words = len(given.source_vocabulary), len(given.target_vocabulary)
    sizes = Sizes(*words, width=WIDTH, attention_size=attention_size, readout_size=WIDTH)

    build = functools.partial(_translator, score, sizes, normalizer)

    def loss(model: Translator, pairs: tuple[Array, Array]) -> Array:
        logits, _ = model(*pairs)
        return jnp.sum(token_losses(logits, pairs[1].T)) / jnp.sum(pairs[1] != PAD)

    return Model(arm_of(build, loss), build, functools.partial(decode.greedy, graph_of(build)))


def _translator(
    score: str, sizes: Sizes, normalizer: Callable[..., Any] | None, rngs: nnx.Rngs
) -> Translator:
    model = Translator(score, sizes, rngs=rngs)
    if normalizer is not None:
        options = {"attention_size": sizes.attention_size, "normalizer": normalizer, "rngs": rngs}
        model.decoder.attention = AdditiveAttention(sizes.width, sizes.width, **options)
    return model


def transformer(given: Material, heads: int, **options: Any) -> Model:
    """Return a Transformer of one block on either side; options are those of its attention."""
    words = len(given.source_vocabulary), len(given.target_vocabulary)
    attention = functools.partial(MultiHeadAttention, **options)
    given_options = {
        "hidden_features": 2 * WIDTH,
        "norm_placement": "before",
        "attention": attention,
    }
    given_options |= {"features": WIDTH, "num_heads": heads, "num_layers": 1}
    model = functools.partial(EncoderDecoder, *words, **given_options)

    def build(rngs: nnx.Rngs) -> EncoderDecoder:
        return model(rngs=rngs)

    def loss(model: EncoderDecoder, pairs: tuple[Array, Array]) -> Array:
        return teacher_forced(model, pairs)[0]

    merge = merged(build)

    def translate(longest: int, parameters: Any, source: Array) -> Array:
        begin = jnp.full((len(source), 1), BOS, jnp.int32)
        request = source, begin, longest, present(source)
        return jax.vmap(lambda own: merge(own).generate(*request))(parameters)

    return Model(arm_of(build, loss), build, translate)


class Model(NamedTuple):
    """The arm, the module that it trains, and the translation of sources [B, S] by all seeds."""

    arm: Arm
    build: Callable[[nnx.Rngs], Any]
    translate: Callable[[int, Any, Array], Array]

    def train(self, setting: Setting, given: Material, text: Text | None = None) -> Trained:
        """Train six seeds and more at each learning rate, and keep the best rate."""
        return train(
            self.arm,
            batch,
            jax.random.key(0),
            rates=setting.pick(tiny=(3e-3,), quick=(3e-3, 1e-2), full=(3e-3, 1e-2, 3e-2)),
            seeds=setting.pick(tiny=2, quick=6, full=8),
            steps=setting.pick(tiny=4, quick=250, full=1000),
            data=given.train if text is None else text,
            held_out=(given.valid.source, given.valid.target),
        )

    def bleu(self, parameters: Any, given: Material) -> list[float]:
        """BLEU of the greedy translations of the test set, for each seed."""
        longest = given.test.target.shape[1] + 2
        words = jax.jit(functools.partial(self.translate, longest))(parameters, given.test.source)
        references = [pair.target for pair in given.pairs]
        decode = given.target_vocabulary.decode
        return [
            metrics.bleu([decode(ids) for ids in of_seed], references).value
            for of_seed in np.asarray(words).tolist()
        ]


def teacher_forced(
    model: EncoderDecoder, pairs: tuple[Array, Array], **options: Any
) -> tuple[Array, Any]:
    """Return the mean loss of a target word and the output of the model."""
    source, target = pairs
    begun = jnp.concatenate([jnp.full_like(target[:, :1], BOS), target[:, :-1]], axis=1)
    found = model(source, begun, present(source), **options)
    logits = found[0] if isinstance(found, tuple) else found
    return jnp.sum(token_losses(logits, target)) / jnp.sum(target != PAD), found


def present(tokens: Array) -> masks.Lengths:
    """Return the mask that hides padding."""
    return masks.Lengths(jnp.sum(tokens != PAD, axis=1, dtype=jnp.int32))


@functools.cache
def by_attention_size(setting: Setting) -> Data:
    """Train recurrent translators with scores at several attention sizes.

    Returns:
      The sizes; and for each score, at each size, BLEU, held-out loss of every seed, and the best
      learning rate.
    """
    sizes = setting.pick(tiny=(2,), quick=(2, 16, 256), full=(2, 8, 32, 128, 512))
    given = material(setting)
    data: Data = {"sizes": sizes, "bleu": {}, "loss": {}, "rate": {}}
    for score in SCORES:
        data["bleu"][score], data["loss"][score], data["rate"][score] = [], [], []
        for size in sizes:
            model = recurrent(given, score, size)
            trained = model.train(setting, given)
            data["bleu"][score].append(model.bleu(trained.parameters, given))
            data["loss"][score].append(trained.losses)
            data["rate"][score].append(trained.rate)
    return data


@functools.cache
def trained_transformer(
    setting: Setting, heads: int, variant: str = ""
) -> tuple[Any, Trained, list[float]]:
    """Train Transformers of a number of heads and one of VARIANTS; return the model and BLEU."""
    given = material(setting)
    model = transformer(given, heads, **VARIANTS[variant])
    trained = model.train(setting, given)
    return model, trained, model.bleu(trained.parameters, given)


def not_oneself(q_idx: jax.Array, kv_idx: jax.Array) -> jax.Array:
    """Attend to oneself only where there is nothing else (Kitaev et al. 2020, section 2)."""
    return jnp.where(q_idx == kv_idx, -1e5, 0.0)


VARIANTS: Mapping[str, dict[str, Any]] = {
    "": {},
    "summed": {"combine": "sum"},
    "tied": {"share_query_key": True},
    "tied, not oneself": {"share_query_key": True, "bias": not_oneself},
}


@functools.cache
def trained_reversal(setting: Setting, score: str) -> tuple[Any, Trained, Material]:
    """Train recurrent translators to write strings of up to 12 symbols backwards."""
    given = material(setting, "reverse", 12)
    model = recurrent(given, score)
    return model, model.train(setting, given), given
