"""The face that `gpupipe demo` shows."""
