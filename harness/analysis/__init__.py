"""Analysis: pure functions over the tables of a run. No clock, no server, no file, no figure.

    metrics.py    from request records to figures, each formula once
    validity.py   the verdict on a point, with reasons
    counters.py   the engine's token count against ours
    power.py      power, energy, clocks and heat from gpu.csv
    compare.py    one precision against the other, paired, with an interval
    levels.py     repeats of a cell merged into one row; the order of precisions
    knee.py       where p95 leaves the service level, with an interval and a cause
    capacity.py   users, tokens and memory at the operating point; the headline
    cost.py       $/1M output tokens

Whoever reads the CSVs of a run gets the same answers as the machine that measured it.
"""
