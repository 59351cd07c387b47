"""What a release of PEFT makes of configs whose meaning changed: run under each, kept in `tests/records`.

    PYTHONPATH=folder-with-that-release python tests/parity/peft_meanings.py >> tests/records/peft_meanings.jsonl

It prints a line of JSON: the version, and for each kind its config as that release saves it, the shapes of the
adapter's tensors, and the factor that multiplies the product of each module's factors, measured on the merged weight;
for OFT, the merged weight of the identity.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

WIDTH = 8
TARGETS = ["q_proj", "k_proj"]
LAYER0 = "model.layers.0.self_attn.q_proj"
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora, both patterns": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 16, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 64}},
    ),
    "lora, alpha before rank": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 16, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 64, "k_proj": 3}},
    ),
    "lora, anchored": ("LoraConfig", {"r": 4, "lora_alpha": 16, "alpha_pattern": {f"^{LAYER0}": 64}}),
    "lora, anchored rank": ("LoraConfig", {"r": 4, "lora_alpha": 16, "rank_pattern": {f"^{LAYER0}": 2}}),
    "lora, either": ("LoraConfig", {"r": 4, "lora_alpha": 16, "alpha_pattern": {"k_proj|q_proj": 64}}),
    "lora, either, swapped": ("LoraConfig", {"r": 4, "lora_alpha": 16, "alpha_pattern": {"q_proj|k_proj": 64}}),
    "lora, whole path": ("LoraConfig", {"r": 4, "lora_alpha": 16, "alpha_pattern": {LAYER0: 64}}),
    "lora, rank-stabilised": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {LAYER0: 64}},
    ),
    "lora, one pattern": ("LoraConfig", {"r": 4, "lora_alpha": 16, "alpha_pattern": {"q_proj": 64}}),
    "loha, both patterns": (
        "LoHaConfig",
        {"r": 4, "alpha": 16, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 64}},
    ),
    "loha, anchored": ("LoHaConfig", {"r": 4, "alpha": 16, "alpha_pattern": {f"^{LAYER0}": 64}}),
    "loha, either": ("LoHaConfig", {"r": 4, "alpha": 16, "alpha_pattern": {"k_proj|q_proj": 64}}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 16}),
    "lokr, both patterns": (
        "LoKrConfig",
        {"r": 1, "alpha": 16, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"self_attn.q_proj": 64}},
    ),
    "oft, series": (
        "OFTConfig",
        {"r": 0, "oft_block_size": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
    ),
    "oft, series of two": (
        "OFTConfig",
        {"r": 0, "oft_block_size": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 2},
    ),
    "oft, exact": ("OFTConfig", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}),
}


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in (*TARGETS, "v_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
            getattr(self, name).weight.data = torch.eye(WIDTH)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = _Block()


class Net(nn.Module):
    """Two layers with the module paths of a Llama, each weight the identity."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([_Layer(), _Layer()])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs: nothing here computes."""
        return inputs


def measure(config: Any) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Return the shapes of the adapter's tensors by their names in a file, and each module's factor (OFT's matrix)."""
    from peft import get_peft_model

    adapted = get_peft_model(Net(), config)
    shapes: dict[str, list[int]] = {}
    for name, parameter in adapted.named_parameters():
        if ".default" in name:
            saved = name.replace(".default", "")
            shapes[saved] = list(parameter.shape)
            seed = torch.Generator().manual_seed(zlib.crc32(saved.encode()))
            parameter.data = torch.randn(parameter.shape, generator=seed) * 0.3
    parts = {name: tensor.detach().double() for name, tensor in adapted.named_parameters() if ".default" in name}
    merged = adapted.merge_and_unload()
    found = {}
    for path, module in merged.named_modules():
        if path.endswith(tuple(TARGETS)):
            own = {name.split(f"{path}.")[1].split(".")[0]: part for name, part in parts.items() if f".{path}." in name}
            found[path] = _factor(module.weight.detach().double(), own)
    return shapes, found


def _factor(weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> Any:
    if "oft_R" in own:
        return [[round(value, 5) for value in row] for row in weight.tolist()]
    product = _product(own)
    delta = weight - torch.eye(WIDTH, dtype=torch.float64)
    return float(f"{float((delta * product).sum() / (product * product).sum()):.5g}")


def _product(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "lora_A" in own:
        return own["lora_B"] @ own["lora_A"]
    if "hada_w1_a" in own:
        return (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    first = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    second = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    return torch.kron(first, second)


def saved_config(config: Any) -> dict[str, Any]:
    """Return the config as `save_pretrained` writes it."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        made: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
    return made


def main() -> None:
    """Print the record of the PEFT that is installed; a kind that it does not have is left out."""
    # PEFT 0.16 and 0.17 import it, and transformers 5, whose module replaces itself, has none.
    type(transformers).HybridCache = type("HybridCache", (), {})
    import peft

    record: dict[str, Any] = {"version": peft.__version__, "kinds": {}}
    for kind, (name, fields) in KINDS.items():
        try:
            config = getattr(peft, name)(target_modules=TARGETS, **fields)
            saved = saved_config(config)
            shapes, found = measure(config)
        except TypeError as error:
            sys.stderr.write(f"{kind}: {error}\n")
            continue
        record["kinds"][kind] = {"config": saved, "shapes": shapes, "found": found}
    sys.stdout.write(json.dumps(record, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
