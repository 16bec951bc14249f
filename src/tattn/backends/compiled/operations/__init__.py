"""The operations of `tattn.backends.operations` for NumPy arrays, by compiled loops."""
