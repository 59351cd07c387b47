"""Several adapters: what PEFT makes of them, and what each kind of combination is by definition, in float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runner.architecture.names import map_names
from runner.protocol.combination import PRUNING, RANDOM, VOTING, Combination, Several
from tests.parity import models, oracle

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**options: object) -> LoraConfig:
    """Return a LoRA config on all linear layers, changed by `options`."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options})


def combination(kind: str, *weights: float, seed: int = 5, density: float = 0.6) -> Combination:
    """Return a combination with all that its kind needs."""
    return Combination(
        kind=kind,
        weights=weights,
        density=density if kind in PRUNING else None,
        seed=seed if kind in RANDOM else None,
        majority_sign="total" if kind in VOTING else None,
    )


def save_all(base: Path, root: Path, *configs: LoraConfig) -> tuple[Path, ...]:
    """Write one random adapter for each config."""
    return tuple(
        models.save_adapter(base, root / f"adapter{number}", config, seed=3 + number)
        for number, config in enumerate(configs)
    )


def peft_combination(base: Path, several: Several) -> dict[str, torch.Tensor]:
    """Return stored name → float32 tensor, as somebody does it who knows PEFT alone."""
    torch.set_num_threads(1)
    wanted = several.combination
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, several.paths[0], adapter_name="a0")
    for number, path in enumerate(several.paths[1:], start=1):
        peft_model.load_adapter(path, adapter_name=f"a{number}")
    torch.manual_seed(wanted.seed or 0)
    peft_model.add_weighted_adapter(
        [f"a{number}" for number in range(len(several.paths))],
        list(wanted.weights),
        "both",
        combination_type=wanted.kind,
        density=wanted.density,
        majority_sign_method=wanted.majority_sign or "total",
        svd_full_matrices=False,
    )
    merged = peft_model.merge_and_unload(adapter_names=["both"])
    state = merged.state_dict()
    return {name: state[key] for key, name in map_names(merged, oracle.read_folder(base)).renamed.items()}


def equals_peft(base: Path, several: Several, merged: Path) -> bool:
    """Return whether every tensor has PEFT's bits, rounded once; the merge must change something."""
    expected, before, after = peft_combination(base, several), oracle.read_folder(base), oracle.read_folder(merged)
    assert after.keys() == before.keys()
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)
    return all(torch.equal(tensor, expected.get(name, before[name]).to(tensor.dtype)) for name, tensor in after.items())


def _factors(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Return module → (A, B, scaling) in float64, from the files alone."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = (a.double(), tensors[name.replace("lora_A", "lora_B")].double(), scaling)
    return found


def sum_of_deltas(several: Several) -> dict[str, torch.Tensor]:
    """Return Σ w·s·B·A of every module, from the files alone."""
    deltas: dict[str, torch.Tensor] = {}
    for path, weight in zip(several.paths, several.combination.weights, strict=True):
        for module, (a, b, scaling) in _factors(path).items():
            delta = weight * scaling * (b @ a)
            deltas[module] = deltas[module] + delta if module in deltas else delta
    return deltas


def _keep_largest(values: torch.Tensor, density: float) -> torch.Tensor:
    kept = torch.zeros_like(values).flatten()
    order = values.abs().flatten().argsort(descending=True)[: int(density * values.numel())]
    kept[order] = values.flatten()[order]
    return kept.view_as(values)


def _elect(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    winner = torch.where(torch.stack(list(parts)).sum(dim=0) >= 0, 1.0, -1.0)
    agree = torch.stack([part.sign() == winner for part in parts])
    weighted = torch.stack([weight * part for part, weight in zip(parts, weights, strict=True)])
    return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _mix(kind: str, parts: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Return the kind's way to add tensors, with weights."""
    if "prune" in kind or "ties" in kind:
        parts = [_keep_largest(part, density) for part in parts]
    if "ties" in kind:
        return _elect(parts, weights)
    return torch.stack([weight * part for part, weight in zip(parts, weights, strict=True)]).sum(dim=0)


def defined(several: Several, rank: int) -> dict[str, torch.Tensor]:
    """Return the delta of every module by the kind's definition (docs/several-adapters.md)."""
    kind, weights, density = several.combination.kind, several.combination.weights, several.combination.density or 1.0
    if kind == "cat":
        return sum_of_deltas(several)
    all_factors = [_factors(path) for path in several.paths]
    deltas = {}
    for module in all_factors[0]:
        factors = [found[module] for found in all_factors]
        if kind.endswith("svd"):
            mixed = _mix(kind, [scaling * (b @ a) for a, b, scaling in factors], weights, density)
            u, s, v = torch.linalg.svd(mixed, full_matrices=False)
            deltas[module] = u[:, :rank] * s[:rank] @ v[:rank]
        else:
            shares = [weight * scaling for weight, (_, _, scaling) in zip(weights, factors, strict=True)]
            roots = [abs(share) ** 0.5 for share in shares]
            signed = [root if share >= 0 else -root for root, share in zip(roots, shares, strict=True)]
            a = _mix(kind, [a for a, _, _ in factors], signed, density)
            b = _mix(kind, [b for _, b, _ in factors], roots, density)
            deltas[module] = b @ a
    return deltas
