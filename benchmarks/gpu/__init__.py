"""The parts of gpu_check.py, how they are run one entry at a time, and what they write."""
