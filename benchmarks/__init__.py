"""The reference loop and the measurements: run from the repository, never installed."""
