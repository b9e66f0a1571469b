"""One file per stage: Config and main(config)."""
