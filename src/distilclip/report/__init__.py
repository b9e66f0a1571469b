"""Result folders in, one self-contained page out. Imports no torch."""
