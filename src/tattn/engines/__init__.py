"""How sums over all tuples of keys are computed: tuple by tuple, or through features; for all rows and causal."""
