"""The reference loop and the measurements; what `gpupipe bench` runs."""
