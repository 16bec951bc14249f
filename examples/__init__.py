"""Programs to start from. Those that train write pages; they run from the root of the checkout: `python -m examples.drop_in`."""
