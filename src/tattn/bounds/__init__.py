"""What is bounded before anything is computed: the range of the scores, and rounding."""
