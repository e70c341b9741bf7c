"""Heads.

What several heads are good for: parameters, calm, diversity, quality.
"""
