"""Weights of 4 and 8 bits that the GPU multiplies without making 16 bits of them first: CUDA, and torch where none is.

    checkpoint ─► operators.prepare ─► tiles ─► operators.linear ─► gemv.cu      1 to 8 tokens
                                                  (dispatch.py)     gemm.cu      to 64
                                                                    expand       beyond, and torch's own product

`operators.py` is what others call; README.md says how the sources lie, how they are built and how they are proven.
Importing this package imports nothing.
"""
