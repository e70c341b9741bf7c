"""Efficient methods.

What is saved by windows, low rank and kernels, and what it costs in accuracy.
"""
