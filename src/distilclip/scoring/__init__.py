"""Score pairs by their embeddings and clusters, to keep the best of them or to draw some more often."""
