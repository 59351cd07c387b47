"""A checkpoint as it would be stored with fewer tensors, or fewer rows; nothing is copied.

The merged model of an adapter with its own head has no `lm_head`; one with a cut vocabulary has fewer rows. Seen
through a view, everything after it (plan, reader, writer) works as on any other checkpoint: a tensor that lost rows
at its end is the first bytes of the stored one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from runner.files.layout import Checkpoint, TensorFile, TensorInfo, build_header, tensor_size_bytes


def view(
    checkpoint: Checkpoint, *, dropped: Collection[str] = (), cut: Mapping[str, tuple[int, ...]] | None = None
) -> Checkpoint:
    """Return the checkpoint without the tensors `dropped`, and with the shapes `cut`.

    Args:
        checkpoint: as it is on disk.
        dropped: stored names.
        cut: stored name → shape whose bytes are the first ones of the stored tensor's, such as fewer rows.
    """
    cut = cut or {}
    if not dropped and not cut:
        return checkpoint
    files = tuple(_file(file, dropped, cut) for file in checkpoint.files)
    files = tuple(file for file in files if file.tensors)
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    return replace(checkpoint, files=files, tensors=tensors)


def main_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that most of the checkpoint's bytes have, as safetensors spells it."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    return max(sorted(sizes), key=lambda dtype: sizes[dtype])


def _file(file: TensorFile, dropped: Collection[str], cut: Mapping[str, tuple[int, ...]]) -> TensorFile:
    tensors = tuple(_tensor(tensor, cut) for tensor in file.tensors if tensor.name not in dropped)
    if tensors == file.tensors:
        return file
    header = build_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), file.metadata)
    return replace(file, tensors=tensors, header=header)


def _tensor(tensor: TensorInfo, cut: Mapping[str, tuple[int, ...]]) -> TensorInfo:
    shape = cut.get(tensor.name)
    if shape is None:
        return tensor
    return replace(tensor, shape=shape, end=tensor.start + tensor_size_bytes(tensor.dtype, shape))
