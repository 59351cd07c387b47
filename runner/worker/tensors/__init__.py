"""Tensors on disk: read as bytes or mapped, written a shard at a time while its digest is taken."""
