"""Compute measures of features: probes, accuracies, retrieval. Arrays in, numbers out."""
