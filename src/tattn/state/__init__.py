"""Sums over rows that add up: summaries, streams, decoding."""
