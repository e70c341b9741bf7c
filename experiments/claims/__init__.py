"""Claims about attention, each tested: a number, a picture and a verdict computed from data.

A claim is one file in the folder of its theme. Its docstring says what is claimed, by whom, how
it is tested and what decides; `measure` makes the data, `verdict` judges them, `figure` and
`table` show them.
"""
