"""Exports a run for other programs: its predictions, or its network."""
