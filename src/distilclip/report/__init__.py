"""Make one self-contained page from the folders of stages. Imports no torch."""
