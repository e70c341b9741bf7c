"""Cost.

Time by the clock of the processor and bytes as the compiler planned them, against the length.
"""
