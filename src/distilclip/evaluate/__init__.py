"""Evaluation sets and protocols: zero-shot, linear probe, retrieval, agreement."""
