"""The recurrent translator of `experiments.translate` in PyTorch: the same layers and training.

Written to be fast on a CPU: `nn.GRU` on packed sequences reads the source;
keys, the gates' share of embedded words, readout and logits are computed for all positions at
once; the loop over target words has only what depends on the state.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]
from torch.nn.utils.rnn import (  # pyright: ignore[reportMissingImports]
    pack_padded_sequence,
    pad_packed_sequence,
)

from experiments.data.vocabulary import BOS, PAD
from experiments.translate.config import Config
from experiments.translate.model import Sizes

Rows = Sequence[tuple[int, np.ndarray]]
"""The bucket of each chunk, and the rows of it that each step takes, [n, B]."""


class Additive(nn.Module):
    """The score v^T tanh(q + k), with k = W_k h + b."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.query = nn.Linear(width, size, bias=False)
        self.key = nn.Linear(width, size)
        self.value = nn.Parameter(torch.randn(size) / size**0.5)

    def forward(self, query: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
        """Return weights [B, S] of queries [B, A], keys [B, S, A]; `hidden` is -inf or 0."""
        logits = torch.tanh(query[:, None] + keys) @ self.value
        return torch.softmax(logits + hidden, dim=-1)


class ScaledDot(nn.Module):
    """The score q^T k / sqrt(A)."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.query = nn.Linear(width, size, bias=False)
        self.key = nn.Linear(width, size, bias=False)

    def forward(self, query: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
        """Return weights [B, S] of queries [B, A], keys [B, S, A]; `hidden` is -inf or 0."""
        scale = keys.shape[-1] ** -0.5
        logits = torch.baddbmm(hidden[..., None], keys, query[..., None], alpha=scale)
        return torch.softmax(logits[..., 0], dim=-1)


SCORES = {"additive": Additive, "scaled_dot": ScaledDot}


class Translator(nn.Module):
    """Encoder and decoder; arguments as those of `experiments.translate.model.Translator`.

    Gates lie in PyTorch's order: reset, update, candidate.
    """

    def __init__(self, score: str, sizes: Sizes, dropout: float = 0.0):
        super().__init__()
        width = sizes.width
        self.source_words = nn.Embedding(sizes.source_words, width)
        self.encoder = nn.GRU(width, width // 2, bidirectional=True)
        self.bridge = nn.Linear(width, width)
        self.attention = SCORES[score](width, sizes.attention_size)
        self.target_words = nn.Embedding(sizes.target_words, width)
        self.inputs = nn.Linear(width, 3 * width)
        self.context = nn.Linear(width, 3 * width, bias=False)
        self.recurrent = nn.Linear(width, 3 * width)
        self.readout = nn.Linear(3 * width, 2 * sizes.readout_size)
        self.output = nn.Linear(sizes.readout_size, sizes.target_words)
        self.dropout = nn.Dropout(dropout)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits [T, B, W] of each target word given those before it."""
        annotations, state = self.encode(source)
        keys = self.attention.key(annotations)
        hidden = torch.zeros(source.shape).masked_fill_(source == PAD, -torch.inf)
        begin = torch.full_like(target[:, :1], BOS)
        previous = torch.cat([begin, target[:, :-1]], dim=1).T
        embedded = self.dropout(self.target_words(previous))
        states, contexts = [], []
        for gates in self.inputs(embedded).unbind():
            weights = self.attention(self.attention.query(state), keys, hidden)
            context = torch.bmm(weights[:, None], annotations)[:, 0]
            state = self.step(state, gates + self.context(context))
            states.append(state)
            contexts.append(context)
        seen = torch.cat([torch.stack(states), torch.stack(contexts), embedded], dim=-1)
        first, second = self.readout(seen).chunk(2, dim=-1)
        return self.output(self.dropout(torch.maximum(first, second)))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return annotations [B, S, D] of sources [B, S], and the first state [B, D]."""
        lengths = (source != PAD).sum(dim=1)
        embedded = self.dropout(self.source_words(source.T))
        packed = pack_padded_sequence(embedded, lengths, enforce_sorted=False)
        states, last = self.encoder(packed)
        annotations, _ = pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        return annotations, torch.tanh(self.bridge(torch.cat([last[0], last[1]], dim=-1)))

    def step(self, state: Tensor, gates: Tensor) -> Tensor:
        """Step the decoder's GRU, whose gates have this share of word and context."""
        width = state.shape[-1]
        share = self.recurrent(state)
        both = torch.sigmoid(gates[:, : 2 * width] + share[:, : 2 * width])
        reset, update = both.chunk(2, dim=-1)
        candidate = torch.tanh(torch.addcmul(gates[:, 2 * width :], reset, share[:, 2 * width :]))
        return torch.lerp(candidate, state, update)


def weights_like(parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the `state_dict` of the `Translator` with the parameters of one in JAX.

    Args:
      parameters: of one translator in JAX, arrays in dictionaries.
    """
    encoder, decoder = parameters["encoder"], parameters["decoder"]
    kernels = np.split(np.asarray(encoder["inputs"]["kernel"]), 2, axis=1)
    biases = np.split(np.asarray(encoder["inputs"]["bias"]), 2)
    state = {
        "source_words.weight": encoder["embedding"]["embedding"],
        "target_words.weight": decoder["embedding"]["embedding"],
        "recurrent.weight": np.transpose(decoder["recurrent"]),
        "recurrent.bias": decoder["bias"],
        "context.weight": _candidate_last(decoder["context"]["kernel"]).T,
        "inputs.weight": _candidate_last(decoder["inputs"]["kernel"]).T,
        "inputs.bias": _candidate_last(decoder["inputs"]["bias"]),
    }
    for number, end in enumerate(("l0", "l0_reverse")):
        state |= {
            f"encoder.weight_ih_{end}": _candidate_last(kernels[number]).T,
            f"encoder.bias_ih_{end}": _candidate_last(biases[number]),
            f"encoder.weight_hh_{end}": np.transpose(encoder["recurrent"][number]),
            f"encoder.bias_hh_{end}": encoder["bias"][number],
        }
    for name in ("bridge", "readout", "output"):
        state[f"{name}.weight"] = np.transpose(decoder[name]["kernel"])
        state[f"{name}.bias"] = decoder[name]["bias"]
    for name, value in decoder["attention"]["score"].items():
        if name.startswith(("query_", "key_")):
            state[f"attention.{name.partition('_')[0]}.weight"] = np.transpose(value)
        else:
            state[{"bias": "attention.key.bias", "value": "attention.value"}[name]] = value
    return {name: torch.tensor(np.array(value)) for name, value in state.items()}


def _candidate_last(gates: Any) -> np.ndarray:
    """Bring gates in the order candidate, reset, update into PyTorch's."""
    gates = np.asarray(gates)
    return np.roll(gates, -(gates.shape[-1] // 3), axis=-1)


class Trainer:
    """A translator, its optimizer, and the pairs it learns.

    Args:
      score: `additive` or `scaled_dot`.
      sizes: of the translator.
      config: of the run.
      parameters: what to begin with, as the translator in JAX has them.
      buckets: source [n, S] and target [n, T] of each.
    """

    def __init__(
        self,
        score: str,
        sizes: Sizes,
        config: Config,
        parameters: Mapping[str, Any],
        buckets: Sequence[tuple[Any, Any]],
    ):
        self.translator = Translator(score, sizes, config.dropout)
        self.translator.load_state_dict(weights_like(parameters))
        self.buckets = [tuple(torch.from_numpy(np.array(x)).long() for x in b) for b in buckets]
        self.smoothing, self.clip = config.label_smoothing, config.clip
        self.optimizer = torch.optim.AdamW(
            self.translator.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: share_of_rate(config, step)
        )

    def train(self, chunks: Rows) -> np.ndarray:
        """Take all steps of some chunks, and return their losses."""
        losses = []
        for number, chunk in chunks:
            source, target = self.buckets[number]
            for rows in torch.from_numpy(chunk).long():
                losses.append(self._step(source[rows], target[rows]))
        # Copied to the host at the end, because each copy waits for the device.
        return torch.stack(losses).numpy()

    def _step(self, source: Any, target: Any) -> Any:
        logits = self.translator(source, target)
        loss = functional.cross_entropy(
            logits.flatten(0, 1),
            target.T.flatten(),
            ignore_index=PAD,
            label_smoothing=self.smoothing,
        )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.translator.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def share_of_rate(config: Config, step: int) -> float:
    """Return the share of the learning rate in a step: warmed up, then annealed.

    >>> [round(share_of_rate(Config(), step), 3) for step in (0, 40, 80, 440, 800)]
    [0.0, 0.5, 1.0, 0.505, 0.01]
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return step / warmup
    done = min((step - warmup) / (config.steps - warmup), 1)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def choose_threads(trainer: Trainer, chunks: Rows) -> int:
    """Return the number of threads with which a trainer is fastest: one, or one for each core.

    The operations of a small translator are so short that sharing them out can cost more than it
    saves.
    """

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        trainer.train(chunks)
        return time.perf_counter() - start

    trainer.train(chunks[:1])
    return min({1, len(os.sched_getaffinity(0))}, key=seconds)
