"""Evaluation sets: how they lie on disk, their class names and their prompts."""
