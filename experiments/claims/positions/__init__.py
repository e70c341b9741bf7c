"""Positions.

What attention knows of order and distance, and from where it knows it.
"""
