"""Saturation.

What happens when softmax or tanh run into their limits, and whether the numbers survive it.
"""
