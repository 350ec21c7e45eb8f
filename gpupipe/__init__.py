"""gpupipe."""
