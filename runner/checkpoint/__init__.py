"""A folder of safetensors, as data.

`layout` reads headers and the index (no torch), `reader` reads bytes, `writer` writes a shard header first
while its digest is taken, `names` says which stored tensors make which parameter of the model class, and
`digests` names what is in a folder.
"""
