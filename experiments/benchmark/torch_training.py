"""Training of the translator in PyTorch: the same steps as `experiments.translate.learning`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from experiments.benchmark.torch_translator import Translator, weights_like
from experiments.data.vocabulary import PAD
from experiments.translate.config import Config
from experiments.translate.model import Sizes

Rows = Sequence[tuple[int, np.ndarray]]
"""The bucket of each chunk, and the rows of it that each step takes, [n, B]."""


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
        # Read at the end alone: on an accelerator every reading would wait for the device.
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
