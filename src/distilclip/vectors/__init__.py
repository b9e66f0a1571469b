"""Rows as points of a Euclidean space: what grouping and clustering share."""
