"""Small CLIP models from large ones."""
