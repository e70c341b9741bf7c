"""Scale.

How large logits are, what their size depends on, and what keeps it in bounds. Everything else
rests on this: the softmax only sees differences of logits, and large differences leave it one-hot.
"""
