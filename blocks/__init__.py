"""Blocks, policies, and what they cost."""
