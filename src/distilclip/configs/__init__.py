"""State the options of every stage and check them, without torch or numpy: `--help` is immediate."""
