"""Helpers that every part of data_prep/ and train/ may use."""
