"""Make the synthetic corpus: scenes with known truth, their pictures, captions, duplicates, and labelled sets."""
