"""Measurements against the alternatives, and the demo that trains a small model under each policy.

`measure` counts bytes and seconds, `rivals` holds plain PyTorch and its own ways to save memory,
`block` is the benchmark of one stack of blocks, `demo` the training run, `data` the text it reads.
"""
