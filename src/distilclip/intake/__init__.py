"""Take in embeddings that other programs computed: find them, name their rows, and make shards of a store of them."""
