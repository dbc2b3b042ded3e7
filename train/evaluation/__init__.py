"""Scores runs and ensembles: exact metrics over ranks, comparison of models, similarity of representations, export."""
