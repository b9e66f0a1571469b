"""Build and load CLIP models with their preprocessing and tokenizers, teachers, and projection heads."""
