"""The shard folder: writing, reading, verifying it."""
