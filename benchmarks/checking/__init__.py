"""The stages of check.py, and what they find."""
