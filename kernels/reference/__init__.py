"""Every operation in plain PyTorch, forward and hand-written backward.

This is the path that runs on a CPU, and the oracle every kernel is held against. A backward here
never calls autograd: it is the formula, so that a reader can compare it with the kernel's.
"""
