"""Analysis: pure functions over the tables of a run. No clock, no server, no file, no figure.

    levels.py     repeats of a cell merged into one row; the order of precisions
    knee.py       where p95 leaves the service level, with an interval and a cause
    capacity.py   users, tokens and memory at the operating point; the headline
    cost.py       $/1M output tokens

Whoever reads the CSVs of a run gets the same answers as the machine that measured it.
"""
