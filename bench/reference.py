"""The right merge, by PEFT's own hand (each layer in fp32, merged, rounded once), and how far a result is off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A merged folder beside the right one.

    Attributes:
        adapted_elements: of the tensors that the adapter changes.
        differing_elements: of those, how many have other bits than the right ones.
        lost: tensors of the base that the result lacks.
        spoilt: tensors that the adapter does not touch, with other values than the base's, or any of another shape.
        dtypes: of the result, where they are not the base's.
    """

    adapted_elements: int
    differing_elements: int
    lost: tuple[str, ...]
    spoilt: tuple[str, ...]
    dtypes: tuple[str, ...]


def write_reference(base: Path, adapter: Path, into: Path) -> None:
    """Write the right merge of every adapted tensor into `into`, one file for each shard of the base."""
    into.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with two, some shapes are summed in another order
    try:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as factors:
            for shard in sorted(base.glob("*.safetensors")):
                save_file(dict(_merged(shard, factors, config)), into / shard.name)
    finally:
        torch.set_num_threads(threads)


def compare(base: Path, reference: Path, result: Path) -> Difference:
    """Compare every tensor of `result` with the right one, or with the base's where the adapter touches nothing."""
    with ExitStack() as stack:
        expected = _open(stack, base) | _open(stack, reference)
        found = _open(stack, result)
        touched = _open(stack, reference).keys()
        lost = tuple(sorted(expected.keys() - found.keys()))
        adapted = differing = 0
        spoilt, dtypes = [], set()
        for name in sorted(expected.keys() & found.keys()):
            right, given = expected[name].get_tensor(name), found[name].get_tensor(name)
            if given.dtype != right.dtype:
                dtypes.add(str(given.dtype).removeprefix("torch."))
            if given.shape != right.shape:
                spoilt.append(name)
            elif name in touched:
                adapted += right.numel()
                differing += int(torch.count_nonzero(given.ne(right)))
            elif not torch.equal(given.to(right.dtype), right):
                spoilt.append(name)
    return Difference(
        adapted_elements=adapted,
        differing_elements=differing,
        lost=lost,
        spoilt=tuple(spoilt),
        dtypes=tuple(sorted(dtypes)),
    )


def _merged(shard: Path, factors: Any, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    known = set(factors.keys())
    with safe_open(shard, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (no mapping)
            prefix = PREFIX + name.removesuffix(".weight")
            if f"{prefix}.lora_A.weight" in known:
                a, b = (factors.get_tensor(f"{prefix}.lora_{letter}.weight") for letter in "AB")
                yield name, _merge_by_peft(tensors.get_tensor(name), a, b, config)


def _merge_by_peft(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Return `weight` (rows × columns) with the adapter's change, computed by PEFT in fp32 and rounded once."""
    from peft import LoraConfig, get_peft_model

    rows, columns = weight.shape
    with torch.device("meta"):
        linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    lora = LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(linear), lora)
    state = {"base_model.model.0.lora_A.default.weight": a, "base_model.model.0.lora_B.default.weight": b}
    missing = model.load_state_dict(state, strict=False).unexpected_keys
    if missing:
        raise RuntimeError(f"PEFT names its parameters otherwise: {missing}")
    merged: torch.Tensor = model.merge_and_unload()[0].weight.detach()
    return merged.to(weight.dtype)


def _open(stack: ExitStack, folder: Path) -> dict[str, Any]:
    """Return tensor name → the open file that holds it, of every file that the folder's index names, or of all."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    opened = [stack.enter_context(safe_open(folder / file, "pt")) for file in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118  (no mapping)
