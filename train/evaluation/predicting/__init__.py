"""Predicts any images with a run, a probe or an ensemble."""
