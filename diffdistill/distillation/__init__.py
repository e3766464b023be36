"""What a method is, and what several methods share: losses, fields, pairs, segments, divergences, rewards.

Knows no method. Imports networks and what is below. Start with `method`."""
