"""Doctests are looked for in every module; those written in PyTorch need it to be imported."""

from experiments.benchmark.programs import HAS_TORCH

collect_ignore = [] if HAS_TORCH else ["torch_training.py", "torch_translator.py"]
