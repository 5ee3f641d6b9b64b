"""Shard rows in, augmented pairs out."""
