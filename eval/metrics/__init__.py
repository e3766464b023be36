"""Distances and scores in float64, and the metrics that a protocol may name (`settings`). A metric's class owns its facts."""
