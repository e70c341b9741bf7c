"""Expressiveness.

Which functions of a query and a key a score can be, which scores are the same in disguise, and
what attention cannot do at all.
"""
