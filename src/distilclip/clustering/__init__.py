"""Spherical k-means: exact, in parts, up to a million centers."""
