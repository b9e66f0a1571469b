"""Score pairs by their embeddings, to keep the best of them."""
