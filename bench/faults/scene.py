"""A right merge, what it was made of, and how a wrong one is written beside it.

Unchanged shards of a wrong merge are hard links to the right one's; changed ones are copies with tensors patched in.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from runner.files.layout import INDEX_FILE, Checkpoint, read_checkpoint
from tests.judge.merges import TORCH, write_index

SHARD_BYTES = 1 << 16  # files above this size are linked, not copied, where nothing changes them
EMBEDDING = "model.embed_tokens.weight"
Values = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What faults are made from.

    Attributes:
        base: folder of the base.
        adapter: folder of the adapter.
        right: folder of the right merge.
        dtype: what was asked for: "auto", "float16", "float32".
        config: the adapter's.
        plain: by stored name of the merge, the base's weights, float32; of a head that the base ties, the embedding's.
        delta: by stored name, E − W in float32, computed by PEFT in float64, for the tensors that the adapter changes
            and whose shape is the base's.
        saved: by stored name, whole tensors that the adapter brings, float32.
    """

    base: Path
    adapter: Path
    right: Path
    dtype: str
    config: Mapping[str, Any]
    plain: Mapping[str, torch.Tensor]
    delta: Mapping[str, torch.Tensor]
    saved: Mapping[str, torch.Tensor]

    @property
    def weights(self) -> list[str]:
        """Names of the changed matrices, sorted."""
        return sorted(self.delta)

    @property
    def output(self) -> str:
        """The dtype of the merge's weights, as safetensors spells it."""
        return next(iter(read_checkpoint(self.right).tensors.values())).dtype

    @property
    def main(self) -> str:
        """The changed matrix whose change is the largest beside its weights, so that the dtype keeps most of it."""
        return max(self.weights, key=lambda name: float(self.delta[name].norm() / self.plain[name].norm()))

    def exact(self, name: str) -> torch.Tensor:
        """Return E of a tensor as float32: base plus change, what the adapter brings, or the base's."""
        if name in self.saved:
            return self.saved[name]
        return self.plain[name] + self.delta[name] if name in self.delta else self.plain[name]


def set_scene(base: Path, adapter: Path, right: Path, dtype: str) -> Scene:
    """Return the scene of a right merge; PEFT merges a copy of the base in float64."""
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    plain = _read(read_checkpoint(base))
    names = list(read_checkpoint(right).tensors)
    for name in names:
        plain.setdefault(name, plain.get(EMBEDDING, torch.zeros(0)))
    merged = _merge(base, adapter)
    saved_names = tuple(config.get("modules_to_save") or ())
    saved = {name: merged[name].float() for name in names if name.split(".")[-2] in saved_names}
    delta = {}
    for name in names:
        if name in saved:
            continue
        change = (merged[name] - plain[name].double()).float()
        if bool((change != 0).any()):
            delta[name] = change
    return Scene(
        base=base, adapter=adapter, right=right, dtype=dtype, config=config, plain=plain, delta=delta, saved=saved
    )


def _merge(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as handle:
            own = f"base_model.model.{EMBEDDING}"
            rows = handle.get_slice(own).get_shape()[0] if own in handle.keys() else None  # noqa: SIM118
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        peft_model: Any = PeftModel.from_pretrained(model, adapter).double()
        merged = peft_model.merge_and_unload(safe_merge=False)
    return {key: value.detach() for key, value in merged.state_dict().items()}


def _read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: read_tensor(checkpoint, name).float() for name in checkpoint.tensors}


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Return one stored tensor."""
    with safe_open(checkpoint.root / checkpoint.tensors[name].file, framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
    return tensor


def copy_right(scene: Scene, folder: Path) -> Checkpoint:
    """Make `folder` the right merge, large files as hard links, and return it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in scene.right.iterdir():
        if path.suffix == ".safetensors" and path.stat().st_size > SHARD_BYTES:
            os.link(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    return read_checkpoint(folder)


def patch(scene: Scene, folder: Path, values: Values) -> bool:
    """Put other values into a copy of the right merge; return whether any byte differs from it.

    Args:
        scene: of the right merge.
        folder: to be written.
        values: stored name → tensor, rounded to the file's dtype if it is in another.
    """
    checkpoint = copy_right(scene, folder)
    own: set[str] = set()
    differs = False
    for name, value in values:
        info = checkpoint.tensors[name]
        path = folder / info.file
        if info.file not in own:
            path.unlink()
            shutil.copyfile(scene.right / info.file, path)
            own.add(info.file)
        data = as_bytes(value.to(TORCH[info.dtype]))
        with path.open("r+b") as file:
            file.seek(info.start)
            differs = differs or file.read(len(data)) != data
            file.seek(info.start)
            file.write(data)
    return differs


def as_bytes(tensor: torch.Tensor) -> bytes:
    """Return a tensor's memory."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def rewrite(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write one shard anew after `change` has changed its tensors, and the index with it."""
    path = folder / file
    with safe_open(path, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118  (not a dict)
        metadata = handle.metadata()
    change(tensors)
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    if (folder / INDEX_FILE).is_file():
        write_index(folder)
