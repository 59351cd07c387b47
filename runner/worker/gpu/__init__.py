"""The GPU: whether there is one that computes and if not why, and whose turn it is. Only `device` needs torch."""
