"""Ways in which a merge goes wrong, done to a right one on disk.

Every `damage_*(folder, base, adapter)` changes a right merge in place and returns what a judge must say about it. They
work on any LoRA merge whose folder has the base's shards, tiny or real.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from runner.architecture.names import map_names
from runner.files.layout import INDEX_FILE, Checkpoint, read_checkpoint
from runner.protocol.verdict import Layer
from tests.judge.merges import _empty, edit_config, merged_weights, write_index

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What must be said: the layer that fails, and a text that one of its failed checks must contain."""

    layer: Layer
    names: str


Edit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (base's tensor as float32, merged) -> damaged float32


def damage_adapter_not_applied(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """Every tensor is the base's."""
    names = changed(folder, base)
    _edit(folder, base, dict.fromkeys(names, lambda plain, _: plain))
    return Diagnosis(layer=Layer.STORAGE, names="touched" if len(names) > 1 else names[0])


def damage_scale(folder: Path, base: Path, adapter: Path, factor: float = 1.02) -> Diagnosis:
    """The delta is scaled by `factor`."""
    exact = _exact(base, adapter)
    _edit(folder, base, {n: _scaled(exact[n], factor) for n in changed(folder, base)})
    return Diagnosis(layer=Layer.STORAGE, names="ulp off")


def damage_applied_twice(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """The delta is added twice."""
    return damage_scale(folder, base, adapter, 2.0)


def damage_wrong_scaling_rule(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """Read rsLoRA as LoRA (or LoRA as rsLoRA)."""
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    root = math.sqrt(config["r"])
    return damage_scale(folder, base, adapter, 1 / root if config["use_rslora"] else root)


def damage_tensor_skipped(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """One tensor is the base's."""
    name = _middle(folder, base)
    _edit(folder, base, {name: lambda plain, _: plain})
    return Diagnosis(layer=Layer.STORAGE, names=name)


def damage_layer_skipped(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """All tensors of one decoder layer are the base's."""
    layer = _layer(_middle(folder, base))
    _edit(folder, base, {n: (lambda plain, _: plain) for n in changed(folder, base) if _layer(n) == layer})
    return Diagnosis(layer=Layer.STORAGE, names=layer)


def damage_int8_base(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """The delta is added to a base that was quantised to 8 bits per row."""
    exact = _exact(base, adapter)

    def edit(value: torch.Tensor) -> Edit:
        def made(plain: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            step = plain.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
            return (plain / step).round() * step + (value - plain)

        return made

    _edit(folder, base, {n: edit(exact[n]) for n in changed(folder, base)})
    return Diagnosis(layer=Layer.STORAGE, names="ulp off")


def damage_rows_swapped(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """Two rows of one touched tensor change places."""
    name = _middle(folder, base)

    def swap(_: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        merged = merged.clone()
        merged[[1, 2]] = merged[[2, 1]]
        return merged

    _edit(folder, base, {name: swap})
    return Diagnosis(layer=Layer.STORAGE, names=name)


def damage_mantissa_bit(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """One bit of the fraction (worth 4 ulp) of one element of a touched tensor is flipped."""
    name = _middle(folder, base)
    _flip(folder, name, bit=2)
    return Diagnosis(layer=Layer.STORAGE, names=name)


def damage_untouched_bit(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """The lowest bit of one element of an untouched tensor is flipped."""
    names = set(changed(folder, base))
    name = next(n for n in read_checkpoint(folder).tensors if n not in names)
    _flip(folder, name, bit=0)
    return Diagnosis(layer=Layer.STORAGE, names=name)


def damage_tensor_zeroed(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """One touched tensor is all zeros."""
    name = _middle(folder, base)
    _edit(folder, base, {name: lambda _, merged: torch.zeros_like(merged)})
    return Diagnosis(layer=Layer.STORAGE, names=name)


def damage_nan_planted(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """One element of a touched tensor is NaN."""
    name = _middle(folder, base)

    def plant(_: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        merged = merged.clone()
        merged.view(-1)[7] = torch.nan
        return merged

    _edit(folder, base, {name: plant})
    return Diagnosis(layer=Layer.STORAGE, names=f"{name} holds 1 NaN or Inf")


def damage_double_rounding(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """The delta is rounded to bfloat16 before it is added."""
    exact = _exact(base, adapter)

    def edit(value: torch.Tensor) -> Edit:
        return lambda plain, _: plain + (value - plain).bfloat16().float()

    _edit(folder, base, {n: edit(exact[n]) for n in changed(folder, base)})
    return Diagnosis(layer=Layer.STORAGE, names="ulp off")


def damage_missing_shard(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """One shard is not there."""
    name = read_checkpoint(folder).files[-1].name
    (folder / name).unlink()
    return Diagnosis(layer=Layer.STRUCTURE, names=name)


def damage_truncated_shard(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """One shard ends early."""
    name = read_checkpoint(folder).files[0].name
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-100])
    return Diagnosis(layer=Layer.STRUCTURE, names=name)


def damage_tensor_missing(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """One tensor is in no shard, and the index does not know it either."""
    name = _middle(folder, base)
    rewrite(folder, read_checkpoint(folder).tensors[name].file, lambda tensors: tensors.pop(name))
    return Diagnosis(layer=Layer.STRUCTURE, names=f"{name} is missing")


def damage_extra_tensor(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """A tensor is stored that the base does not have."""
    file = read_checkpoint(folder).files[0].name
    rewrite(folder, file, lambda tensors: tensors.update({"model.surplus.weight": torch.zeros(3)}))
    return Diagnosis(layer=Layer.STRUCTURE, names="model.surplus.weight is not expected")


def damage_index_total(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """The index announces another size."""
    path = folder / INDEX_FILE
    index = json.loads(path.read_bytes())
    index["metadata"]["total_size"] += 8
    path.write_text(json.dumps(index))
    return Diagnosis(layer=Layer.STRUCTURE, names="total_size")


def damage_tie_flag(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """The tie flag says the opposite."""
    config = json.loads((folder / "config.json").read_bytes())
    edit_config(folder, tie_word_embeddings=not config["tie_word_embeddings"])
    return Diagnosis(layer=Layer.STRUCTURE, names="tie_word_embeddings")


def damage_config(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """A number in config.json that changes what is computed."""
    config = json.loads((folder / "config.json").read_bytes())
    key = "rms_norm_eps" if "rms_norm_eps" in config else "layer_norm_epsilon"
    edit_config(folder, **{key: 0.01})
    return Diagnosis(layer=Layer.STRUCTURE, names=key)


def damage_tokenizer(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """The chat template is another one."""
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return Diagnosis(layer=Layer.FILES, names="chat_template.jinja is neither")


def damage_adapter_left_in(folder: Path, base: Path, adapter: Path) -> Diagnosis:
    """The adapter lies beside the merged weights, so that transformers applies it once more."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    return Diagnosis(layer=Layer.FILES, names="adapter_config.json")


FAULTS: Mapping[str, Callable[[Path, Path, Path], Diagnosis]] = {
    name.removeprefix("damage_"): function for name, function in list(globals().items()) if name.startswith("damage_")
}


def changed(folder: Path, base: Path) -> list[str]:
    """Return the stored names whose values are not the base's in the folder's dtype, sorted."""
    before, after = read_checkpoint(base), read_checkpoint(folder)
    return sorted(
        name
        for name in before.tensors
        if not torch.equal((value := _load(after, name)), _load(before, name).to(value.dtype))
    )


def _exact(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the merged weights in float32 by stored name."""
    names = map_names(_empty(base), read_checkpoint(base).tensors).renamed
    weights = merged_weights(base, adapter)
    return {stored: weights[key] for key, stored in names.items()}


def _scaled(value: torch.Tensor, factor: float) -> Edit:
    return lambda plain, _: (plain.double() + factor * (value.double() - plain.double())).float()


def _middle(folder: Path, base: Path) -> str:
    names = [name for name in changed(folder, base) if ".weight" in name and "embed" not in name]
    return names[len(names) // 2]


def _layer(name: str) -> str:
    parts = name.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: place + 1]) + "."


def _load(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with safe_open(checkpoint.root / checkpoint.tensors[name].file, framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
    return tensor


def _edit(folder: Path, base: Path, edits: Mapping[str, Edit]) -> None:
    before, after = read_checkpoint(base), read_checkpoint(folder)
    for file in {after.tensors[name].file for name in edits}:

        def apply(tensors: dict[str, torch.Tensor]) -> None:
            for name in tensors.keys() & edits.keys():
                merged = tensors[name]
                tensors[name] = edits[name](_load(before, name).float(), merged.float()).to(merged.dtype)

        rewrite(folder, file, apply)


def _flip(folder: Path, name: str, *, bit: int) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[name].clone()
        bits = tensor.view(BITS[tensor.dtype]).view(-1)
        bits[bits.numel() // 2] ^= 1 << bit
        tensors[name] = tensor

    rewrite(folder, read_checkpoint(folder).tensors[name].file, flip)


def rewrite(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of one file of a checkpoint; an index is made anew."""
    with safe_open(folder / file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118  (not a dict)
        metadata = handle.metadata()
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, metadata=metadata)
    if (folder / INDEX_FILE).is_file():
        write_index(folder)
