"""Models that read, and those of images: values and gradients of other people's code."""

import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import masks, positions
from tests.reference import encoders, images, trees
from tests.reference import trees_of_encoders as more
from tests.reference.sizes import LAYERS, WORDS, D, N

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
comparing = pytest.importorskip("tests.reference.comparing")
pytestmark = pytest.mark.slow

TOKENS = np.array([[5, 9, 2, 30, 14, 7, 7, 21, 6, 11], [3, 3, 11, 36, 8, 1, 19, 4, 4, 8]])
LENGTHS = np.array([10, 6])
SEEN = np.arange(10) < LENGTHS[:, None]
IMAGES = np.random.default_rng(1).standard_normal((2, 8, 12, 3))
OF_BERT = {
    "vocab_size": WORDS,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": N,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}


def only_tokens(output):
    """Leave out what stands for padding, and is computed from it."""
    return output * SEEN[..., None]


def agree(name, model, ours, parameters, run_ours, **inputs):
    given = {"input_ids": TOKENS, "attention_mask": SEEN.astype(int), **inputs}
    given = {key: comparing.tensor(value) for key, value in given.items()}
    other, seen = comparing.drawn(model), comparing.tensor(SEEN[..., None])
    comparing.agree(
        name,
        other,
        ours,
        parameters,
        lambda: other(**given).last_hidden_state * seen,
        lambda ours: only_tokens(run_ours(ours)),
    )


def test_bert():
    config = transformers.BertConfig(**OF_BERT, attn_implementation="eager")
    model, types = transformers.BertModel(config, add_pooling_layer=False), TOKENS % 2
    run = lambda ours: ours.encode(TOKENS, masks.Lengths(LENGTHS), types=types)  # noqa: E731
    agree("BERT", model, encoders.bert(), trees.bert, run, token_type_ids=types)


def test_roformer():
    """Their table of angles is in single precision, so it is made anew."""
    model = transformers.RoFormerModel(transformers.RoFormerConfig(**OF_BERT))
    angles = positions.sinusoidal(np.arange(64), D // N, halves=True, dtype=jnp.float64)
    model.encoder.embed_positions.weight.data = comparing.tensor(angles)
    run = lambda ours: ours.encode(TOKENS, masks.Lengths(LENGTHS))  # noqa: E731
    agree("RoFormer", model, encoders.roformer(), more.roformer, run)


def test_albert():
    config = transformers.AlbertConfig(**OF_BERT, embedding_size=6)
    model = transformers.AlbertModel(config, add_pooling_layer=False)
    run = lambda ours: ours.encode(TOKENS, masks.Lengths(LENGTHS))  # noqa: E731
    agree("ALBERT", model, encoders.albert(), more.albert, run)


def test_modernbert():
    """Every other layer sees 2 tokens on either side."""
    kinds = ["full_attention", "sliding_attention"]
    rope = [{"rope_type": "default", "rope_theta": base} for base in (160_000.0, 10_000.0)]
    config = transformers.ModernBertConfig(
        **OF_BERT,
        local_attention=4,
        layer_types=kinds,
        rope_parameters=dict(zip(kinds, rope, strict=True)),
        attn_implementation="eager",
    )
    mask = encoders.mask_of_modernbert(LENGTHS)
    run = lambda ours: ours.encode(TOKENS, mask)  # noqa: E731
    model = transformers.ModernBertModel(config)
    agree("ModernBERT", model, encoders.modernbert(), more.modernbert, run)


def test_fnet():
    """It knows no masks."""
    model = transformers.FNetModel(transformers.FNetConfig(**OF_BERT), add_pooling_layer=False)
    other, tokens = comparing.drawn(model), comparing.tensor(TOKENS)
    comparing.agree(
        "FNet",
        other,
        encoders.fnet(),
        more.fnet,
        lambda: other(tokens).last_hidden_state,
        lambda ours: ours.encode(TOKENS),
    )


def test_longformer():
    """Tokens 0 and, in the second example, 3 are global, and positions count from 1."""
    config = transformers.LongformerConfig(**OF_BERT, attention_window=4, type_vocab_size=2)
    model = transformers.LongformerModel(config, add_pooling_layer=False)
    at = np.array([[0, -1], [0, 3]])
    is_global = (np.arange(10) == at[..., None]).any(axis=1)
    mask = encoders.mask_of_longformer(LENGTHS, is_global)
    run = lambda ours: ours.encode(TOKENS, mask, positions=np.arange(1, 11), global_tokens=at)  # noqa: E731
    marks = {"global_attention_mask": is_global.astype(int)}
    agree("Longformer", model, encoders.longformer(), trees.longformer, run, **marks)


def test_bigbird():
    """Random blocks are those that the other drew."""
    config = transformers.BigBirdConfig(
        **OF_BERT, block_size=2, num_random_blocks=1, hidden_act="gelu", use_bias=True
    )
    model = comparing.drawn(transformers.BigBirdModel(config, add_pooling_layer=False)).train()
    tokens = np.random.default_rng(0).integers(1, WORDS, (2, 20))
    lengths, chosen = np.array([20, 15]), []
    for layer in model.encoder.layer:
        attention = layer.attention.self
        np.random.seed(attention.seed)
        plan = attention._get_rand_attn_plan(20, 2, 1)
        drawn = attention._bigbird_block_rand_mask_with_head(20, 20, 2, 2, N, *plan)
        chosen.append(np.pad(np.stack(drawn), ((0, 0), (1, 1), (0, 0)), constant_values=-1))
    mask = encoders.mask_of_bigbird(lengths, np.stack(chosen))
    seen = np.arange(20) < lengths[:, None]
    given = {"input_ids": comparing.tensor(tokens), "attention_mask": comparing.tensor(seen * 1)}
    comparing.agree(
        "BigBird",
        model,
        encoders.bert(),
        trees.bert,
        lambda: model(**given).last_hidden_state * comparing.tensor(seen[..., None]),
        lambda ours: ours.encode(tokens, mask) * seen[..., None],
    )


def test_deberta():
    config = transformers.DebertaV2Config(
        **OF_BERT,
        relative_attention=True,
        position_buckets=8,
        max_relative_positions=64,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    model = transformers.DebertaV2Model(config)
    run = lambda ours: ours.encode(TOKENS, masks.Lengths(LENGTHS))  # noqa: E731
    agree("DeBERTa", model, encoders.deberta(), trees.deberta, run)


def test_xlnet():
    config = transformers.XLNetConfig(
        vocab_size=WORDS, d_model=D, n_layer=LAYERS, n_head=N, d_inner=24, dropout=0.0
    )
    model = transformers.XLNetModel(config)
    run = lambda ours: ours.encode(TOKENS, masks.Lengths(LENGTHS))  # noqa: E731
    agree("XLNet", model, encoders.xlnet(), trees.xlnet, run)


OF_IMAGES = {"image_size": (8, 12), "patch_size": 2, "num_channels": 3}
OF_SWIN = {
    **OF_IMAGES,
    "embed_dim": D,
    "depths": [LAYERS],
    "num_heads": [N],
    "window_size": images.SQUARE,
    "mlp_ratio": 1.5,
    "drop_path_rate": 0.0,
}
IMAGE_MODELS = {
    "Swin": (transformers.SwinConfig, transformers.SwinModel, images.swin, trees.swin),
    "Swin v2": (transformers.Swinv2Config, transformers.Swinv2Model, images.swin2, trees.swin2),
}


def test_vit():
    config = transformers.ViTConfig(
        **OF_IMAGES,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=N,
        intermediate_size=24,
        num_labels=5,
        attn_implementation="eager",
    )
    other = comparing.drawn(transformers.ViTForImageClassification(config))
    pixels = comparing.tensor(IMAGES.transpose(0, 3, 1, 2))
    comparing.agree(
        "ViT", other, images.vit(), trees.vit, lambda: other(pixels).logits, lambda x: x(IMAGES)
    )


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_swin(name):
    config, model, build, parameters = IMAGE_MODELS[name]
    other = comparing.drawn(model(config(**OF_SWIN), add_pooling_layer=False))
    pixels = comparing.tensor(IMAGES.transpose(0, 3, 1, 2))
    comparing.agree(
        name,
        other,
        build(),
        parameters,
        lambda: other(pixels).last_hidden_state,
        lambda ours: ours(jnp.asarray(IMAGES)),
    )


def test_dinov2():
    config = transformers.Dinov2Config(
        **{**OF_IMAGES, "image_size": (8, 8)},
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=N,
        mlp_ratio=2,
        attn_implementation="eager",
    )
    other, square = comparing.drawn(transformers.Dinov2Model(config)), IMAGES[:, :, :8]
    pixels = comparing.tensor(square.transpose(0, 3, 1, 2))
    comparing.agree(
        "DINOv2",
        other,
        images.dinov2(),
        more.dinov2,
        lambda: other(pixels).last_hidden_state,
        lambda ours: ours.encode(jnp.asarray(square)),
    )


def test_perceiver():
    config = transformers.PerceiverConfig(
        num_latents=5,
        d_latents=D,
        d_model=6,
        num_blocks=2,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=2,
    )
    other = comparing.drawn(transformers.PerceiverModel(config))
    inputs = np.random.default_rng(0).standard_normal((2, 9, 6))
    comparing.agree(
        "Perceiver",
        other,
        images.perceiver(),
        more.perceiver,
        lambda: other(comparing.tensor(inputs)).last_hidden_state,
        lambda ours: ours(jnp.asarray(inputs)),
    )


def test_qformer():
    config = transformers.Blip2QFormerConfig(
        **OF_BERT, cross_attention_frequency=2, encoder_hidden_size=6
    )
    other = comparing.drawn(transformers.Blip2QFormerModel(config))
    draw = np.random.default_rng(0).standard_normal
    queries, image = draw((2, 5, D)), draw((2, 9, 6))
    given = {"query_embeds": queries, "encoder_hidden_states": image}
    given = {name: comparing.tensor(x) for name, x in given.items()}
    comparing.agree(
        "BLIP-2's Q-Former",
        other,
        images.qformer(),
        more.qformer,
        lambda: other(**given).last_hidden_state,
        lambda ours: ours(jnp.asarray(queries), jnp.asarray(image)),
    )
