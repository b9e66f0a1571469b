"""Evaluate models on sets: features, the protocol, scores and tables."""
