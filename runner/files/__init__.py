"""Folders on disk as bytes and data: headers and index, digests, the adapter, files beside the weights. No torch."""
