"""`python -m distilclip`, and `torchrun -m distilclip`: the command line."""

from distilclip.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
