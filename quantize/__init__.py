"""Post-training weight quantization: from a model in 16 bits to a checkpoint in few that vLLM serves.

    model ─► calibration (one decoder block at a time) ─► fold, round ─► packing ─► checkpoint ─► vLLM
                                                                                      └► fidelity (torch)

`job.quantize_model` is the whole of it in one call, and `python -m quantize` the same from a shell. Importing this
package loads neither torch nor transformers, so that a command line which only wants the errors stays quick.
"""
