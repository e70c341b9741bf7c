"""Collect doctests of the PyTorch module only where PyTorch is installed."""

from experiments.benchmark.programs import HAS_TORCH

collect_ignore = [] if HAS_TORCH else ["torch_translator.py"]
