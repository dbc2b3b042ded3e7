"""Processes and devices, and the same step under every strategy: one process, DDP, DeepSpeed."""
