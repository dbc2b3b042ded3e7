"""Figures and charts of scores and predictions."""
