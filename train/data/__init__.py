"""Shards -> batches on the device: which stimulus goes where and when, decoded once, of one or several recordings."""
