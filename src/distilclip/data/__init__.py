"""Pairs in, joined batches out: shards, samples, the store, the training stream."""
