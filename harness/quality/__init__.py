"""What quantization breaks: the same questions to every precision, judged, compared in pairs, and catalogued.

    prompts.py ─► asking.py ─► checks.py ─► answers.jsonl ─┐   (sandbox.py, inside.py run code that a model wrote)
    texts.py   ─► scoring.py ─────────────► positions.csv ─┼─► harness.analysis ─► failures.md, quality.md, the papers
    tasks.py, lm_eval.py ────────────────► samples.csv ───┘

`job.py` serves each precision in turn, the baseline first, and `directory.py` keeps what came back. What is measured
here is no speed: nothing in this room looks at a clock, and it asks through the control plane's client.
"""
