"""Groups of similar rows: exact near pairs, their spanning forest, and the row kept of each group."""
