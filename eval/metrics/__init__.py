"""Distances and scores in float64, and the metrics that a protocol may name.

Those are in `settings`: a metric's class owns its facts.
"""
