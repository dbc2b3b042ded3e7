"""Exact linear algebra over ranks: Gram matrices, ridge regression, windows, stacking."""
