"""Read shards and samples, write and read the store, and stream batches for training."""
