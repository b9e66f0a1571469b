"""CLIP models, their preprocessing and tokenizers; teachers; projection heads."""
