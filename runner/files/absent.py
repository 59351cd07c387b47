"""What a folder or repository without a transformers checkpoint's safetensors is, by its files' names, and what to do.

An adapter, GGUF, pickled weights, a dtype variant, shards without their index, another framework's file. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from runner.protocol.errors import BrokenCheckpoint, CheckpointError, UnsupportedCheckpoint

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
OPT_IN = (
    "Use a revision with safetensors, or add `pickle` to `allow`: then tensors, and nothing else, are unpickled, in a "
    "process that holds no token."
)

_ADAPTERS = frozenset({"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"})
_PICKLED = frozenset({"pytorch_model.bin", "pytorch_model.bin.index.json"})  # what `pickle` in `allow` converts
_VARIANT = re.compile(r"model\.(?P<variant>[A-Za-z0-9_]+)\.safetensors")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_ORIGINAL = (
    "Set `base-model` (for `verify`: `merged-path`) to the transformers checkpoint that it was made from, with "
    "safetensors; its model card names it."
)
# What other programs call their weights, and what each is.
_OTHERS = (
    (re.compile(r".*\.gguf"), "GGUF, the format of llama.cpp"),
    (re.compile(r"weights\.(?:\d+\.)?npz"), "mlx's older format"),
    (re.compile(r"consolidated(?:\.[\w.]+)?\.(?:pth|safetensors)"), "the authors' own layout"),
    (re.compile(r"tf_model\.h5"), "a TensorFlow model"),
    (re.compile(r"flax_model(?:-\d+-of-\d+)?\.msgpack"), "a Flax model"),
    (re.compile(r".*\.onnx"), "an ONNX model"),
    (re.compile(r"model_index\.json"), "a pipeline of diffusers"),
    (re.compile(r".*\.(?:bin|pt|pth|ckpt)"), "pickled weights under a name that transformers does not load"),
    (re.compile(r".*\.safetensors"), "safetensors under a name that transformers does not load"),
)
# Trainers leave these beside any model; none of them is its weights.
_LEFTOVERS = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state\w*)\.(?:bin|pt|pth)")


def no_weights(paths: Collection[str], *, named: str, adapter_base: str | None = None) -> CheckpointError:
    """Return the error for a folder or repository that lacks the file that says where its weights are.

    Args:
        paths: its files, relative to it.
        named: how to call it, such as "The checkpoint" or `owner/name`.
        adapter_base: the base that its adapter_config.json names, where that was read.
    """
    names = {path for path in paths if "/" not in path and not _LEFTOVERS.fullmatch(path)}
    if _ADAPTERS & names:
        return adapter_as_base(named, adapter_base)
    if _PICKLED & names:
        return UnsupportedCheckpoint(
            f"{named} has pickled weights only ({min(_PICKLED & names)}).",
            why="Unpickling can run code, so only safetensors are read.",
            fix=OPT_IN,
        )
    return _variant(names, named) or _other(names, named) or _nothing(named)


def adapter_as_base(named: str, adapter_base: str | None = None) -> UnsupportedCheckpoint:
    """Return the error for an adapter where a base model belongs; `adapter_base` is the base that it names."""
    told = f", of the base {adapter_base[:120]!r}" if adapter_base else ""
    return UnsupportedCheckpoint(
        f"{named} is an adapter{told}, not a base model.",
        why="It holds a change to a model, and no model; an adapter is merged into the model that it was trained on.",
        fix="Set `base-model` (for `verify`: `merged-path`) to a model. If your adapter was trained on top of this "
        "adapter, merge this one into its own base first, and set `base-model` to the folder or repository of that "
        "merge.",
    )


def _variant(names: Collection[str], named: str) -> CheckpointError | None:
    for name in sorted(names):
        if found := _VARIANT.fullmatch(name):
            return UnsupportedCheckpoint(
                f"{named} has only the variant {found['variant']!r} of its weights ({name}).",
                why=f"A loader takes {_SINGLE} or {_INDEX} unless it is told the variant.",
                fix=f"In a copy of the base, rename {name} to {_SINGLE}, and set `base-model` to that folder.",
            )
    if shards := sorted(name for name in names if _SHARD.fullmatch(name)):
        return BrokenCheckpoint(
            f"{named} has shards ({shards[0]} and {len(shards) - 1} more) and no {_INDEX}.",
            why="The index says which tensors make the model, and in which shard each is.",
            fix="Download or save the base again, as a whole.",
        )
    return None


def _other(names: Collection[str], named: str) -> CheckpointError | None:
    for pattern, kind in _OTHERS:
        if found := sorted(name for name in names if pattern.fullmatch(name)):
            return UnsupportedCheckpoint(
                f"{named} holds {kind} ({found[0]}), and neither {_SINGLE} nor {_INDEX}.",
                why="A base is read as transformers stores it, in safetensors.",
                fix=_ORIGINAL,
            )
    return None


def _nothing(named: str) -> CheckpointError:
    return BrokenCheckpoint(
        f"{named} has neither {_SINGLE} nor {_INDEX}.",
        why="A base model has one of them beside its config.json.",
        fix="Check the path or repository, and its revision: it must hold a transformers checkpoint.",
    )
