"""Exported."""
