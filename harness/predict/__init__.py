"""A sweep on a card that is not here: predicted in virtual time, with an error band, and how wrong that is.

    cards, shapes          what is known of cards and models (scenarios/catalogue/gpus.toml, scenarios/shapes/)
    roofline, processor    how long a step takes, on a card and on a processor
    memory                 what is left for the KV cache
    limits, scheduler, blocks, stretches
                           vLLM's scheduler, a step at a time or in leaps
    loads, cell            the users of a measured cell, and the figures of its row
    run, rank              a run directory; cards by $ a month
    published, expect, fit, validate, validation, scatter, bands, coefficients, kv_logs
                           what others have measured, and how far predictions are from it
    subject, points, calibrate, profile, calibration
                           the same card made one's own by 3 to 6 measured points
    realtime, server, serving, answers, exporter
                           the OpenAI API with the predicted timing
    commands               bench predict, gpus, calibrate, serve-simulated

Read roofline.py, scheduler.py and cell.py, in this order.
"""
