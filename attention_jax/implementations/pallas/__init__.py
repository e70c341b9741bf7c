"""Kernels that are generated from any score, mask, bias and normalizer, for TPU and GPU."""
