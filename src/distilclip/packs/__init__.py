"""Keep the rows to train on at rest: shuffled once, in shards that are read in order."""
