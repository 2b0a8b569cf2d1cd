"""Analysis: pure functions over the tables of a run. No clock, no server, no file, no figure.

    metrics.py      from request records to figures, each formula once; percentiles.py: their intervals
    validity.py     the verdict on a point, with reasons
    counters.py     the engine's token count against ours
    power.py        power, energy, clocks and heat from gpu.csv
    levels.py       repeats of a cell merged into one row; the order of precisions
    compare.py      one precision against the other, paired, with an interval
    regression.py   a run against an earlier one

    knee.py         where the service level is left, with an interval and a cause
    usl.py          where throughput stops growing: Universal Scalability Law, Kneedle, asymptotic bound
    crossover.py    up to which load one precision is ahead of the other
    headline.py     the one sentence that people came for; words.py: how a predicted run is spoken of

    capacity.py     what a card carries, and how many cards that makes
    cost.py         $/1M tokens at an operating point
    saving.py       what one precision saves against the other at the same service level
    spend.py        what the cards cost a month, and when an API is cheaper

    timeline.py     where the time of a traced generation goes, by kind, and what changed between two precisions
    ceilings.py     bytes and FLOPs of a step under the machine's ceilings
    relief.py       did fewer bits bring the FLOP ceiling closer, or just relieve bandwidth

    paired.py       tests and intervals for what was measured in pairs
    quality.py      KL, perplexity and flips beside the baseline; the first token that differs
    symptoms.py     what is wrong with an answer, in one word; loops.py: words said again and again; breaks.py: where a
                    text comes apart
    failures.py     each answer beside the baseline's, families, patterns, examples
    gate.py         limits on quality, judged by the worse end
    correct.py      what a correct answer costs; evidence.py: all that papers may say of quality

    sides.py        two precisions side by side, and the rows that a statement cites
    trials.py       the tests that a claim is put to
    claims.py       what people say of AWQ, GPTQ and INT4, judged by a run
    bullets.py      what speaks for a precision and against it, if the numbers do; case.py: what they look at
    decision.py     what to sign off, in a sentence

Whoever reads the CSVs of a run gets the same answers as the machine that measured it.
"""
