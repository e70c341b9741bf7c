"""Translation.

Claims about training, trained: recurrent and Transformer translators of a generated grammar,
several seeds of each arm, the learning rate of each arm swept.
"""
