"""Sampling: caches, constrained generation of text and picture tokens, and their pictures."""
