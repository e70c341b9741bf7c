"""Masks and decoding.

Whether what must not be seen is not seen, in every number and every gradient.
"""
