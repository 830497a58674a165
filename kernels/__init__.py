"""The operations a transformer block is made of: reference implementations.

Nothing in this package knows of blocks, policies or models: functions take tensors and numbers.
"""
