"""Exact regression from features to sites, with the stimuli spread over ranks: Gram matrices, ridge, stacking."""
