"""Experiments with attention_jax; each program is ``python -m experiments.NAME``."""
