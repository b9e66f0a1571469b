"""Read evaluation sets: how they lie on disk, their class names and their prompts."""
