"""Reports: a run directory in, files for people out. Only formatting; every number comes from harness.analysis.

    run.py        reads a run directory
    plots.py      figures; the only module that imports matplotlib
    placing.py    where their labels and ticks go
    setup.py      with what a run was measured, in words
    tables.py     records as Markdown tables
    markdown.py   capacity.md, through templates/capacity.md.j2

A report depends on the run's files alone: the same files give the same bytes.
"""
