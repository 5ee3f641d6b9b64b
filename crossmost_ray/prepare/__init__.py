"""Meshes of a public collection in, checked Parquet shards out; training never imports it."""
