"""Searches over recipes: what is tried, the queue that workers share, one trial, standings."""
