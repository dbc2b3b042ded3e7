"""Recipes, run folders, checkpoints, log and TensorBoard."""
