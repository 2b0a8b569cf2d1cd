"""Reports: a run directory in, files for people out. Only formatting; every number comes from harness.analysis.

    run.py          reads a run directory
    papers.py       writes all papers of a run, or of many
    markdown.py     capacity.md, through templates/capacity.md.j2
    html.py         capacity.html, dressed from that text; whatif.py is the data of its what-if panel
    workbook/       cost.xlsx: live formulas over the rows
    brief.py        risk_brief.md and business_case.md; guidance.py has the tables of the first
    failures.py     failures.md: what breaks, with examples; quality.py: quality.md, how far, and whether it ships
    answers.py      the section on quality of a sweep's page; logs.py: what the engine's logs say
    trace.py        the papers of a traced generation; compute_graph.py is its page, compute_words.py the answer and
                    bullets in it
    versus.py       two runs, before and after; differences.py says what else differs between them
    history.py      the runs of a directory as rows
    terminal.py     what the commands print

    page.py         a Markdown page out of its template
    tables.py       records as Markdown tables
    knees.py        knees, their three views and crossovers in words
    planning.py     cards, money and memory in words
    setup.py        with what a run was measured, in words
    predicted.py    what the papers of a predicted run say more, and how each block of them owns up
    plots.py        figures of a sweep, quality_plots.py those of quality, timeline_plots.py and kind_plots.py those of
                    a trace; they alone import matplotlib
    placing.py      where their labels and ticks go

A report depends on the run's files alone: the same files give the same bytes.
"""
