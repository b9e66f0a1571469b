"""Check the folders of stages against what was written down of them, and remove what is damaged. Imports no torch."""
