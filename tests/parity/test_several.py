"""Several adapters: the merge equals PEFT's `add_weighted_adapter` on the float32 base, merged and rounded once.

Beside PEFT as the oracle stand the definitions of the kinds, written here once more in float64: PEFT's call is wrong
in some cases (each has a test that pins it), and there the definition decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runner.checkpoint.names import map_names
from runner.combination import KINDS, PRUNING, RANDOM, VOTING, Combination, Several
from runner.errors import AdapterMismatch, UnsupportedAdapter
from tests.parity import models, oracle
from tests.parity.pipeline import run_merge

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _lora(**options: object) -> LoraConfig:
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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_base(models.llama(tied=False), tmp_path_factory.mktemp("base") / "b", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return save_all(base, tmp_path_factory.mktemp("pair"), _lora(), _lora(lora_alpha=16))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_peft(kind: str, base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    several = Several(paths=pair, combination=combination(kind, 0.7, -0.4))

    plan, merged = run_merge(base, several, tmp_path / "merged")

    assert equals_peft(base, several, merged.root)
    assert any(kind in note for note in plan.summary.notes)


@pytest.mark.parametrize("kind", ["linear", "cat", "ties_svd"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_every_dtype_equals_peft(kind: str, stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=stored)
    config = _lora(target_modules=["q_proj", "up_proj"])
    several = Several(paths=save_all(base, tmp_path, config, config), combination=combination(kind, 1.0, 0.5))

    _, merged = run_merge(base, several, tmp_path / "merged", dtype=dtype)

    assert equals_peft(base, several, merged.root)


def _three() -> tuple[LoraConfig, ...]:
    return _lora(), _lora(target_modules=["q_proj"]), _lora(target_modules=["up_proj", "v_proj"])


CASES: Mapping[str, tuple[Callable[[], tuple[LoraConfig, ...]], Sequence[str]]] = {
    "ranks": (lambda: (_lora(r=2), _lora(r=5)), ("cat", "svd", "ties_svd", "dare_linear_svd")),
    "modules": (lambda: (_lora(target_modules=["q_proj"]), _lora(target_modules=["v_proj", "q_proj"])), KINDS),
    "apart": (lambda: (_lora(target_modules=["q_proj"]), _lora(target_modules=["v_proj"])), ("linear", "cat", "svd")),
    "three": (_three, ("linear", "cat", "svd", "dare_ties")),
    "rank_pattern": (
        lambda: (_lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}), _lora(rank_pattern={"q_proj": 2})),
        ("linear", "cat", "ties"),
    ),
    "embeddings": (
        lambda: (_lora(target_modules=["q_proj", "embed_tokens", "lm_head"]), _lora(target_modules=["embed_tokens"])),
        ("linear", "cat", "svd"),
    ),
    "second_rslora": (lambda: (_lora(), _lora(use_rslora=True)), ("linear", "cat", "svd")),
    "expression": (
        lambda: (_lora(target_modules=r".*\.0\..*q_proj"), _lora(target_modules=r".*v_proj")),
        ("linear", "cat"),
    ),
}


@pytest.mark.parametrize("name, kind", [(name, kind) for name, (_, kinds) in CASES.items() for kind in kinds])
def test_every_shape_of_adapters_equals_peft(name: str, kind: str, base: Path, tmp_path: Path) -> None:
    adapters = save_all(base, tmp_path, *CASES[name][0]())
    weights = (0.7, -0.4, 1.5)[: len(adapters)]
    several = Several(paths=adapters, combination=combination(kind, *weights))

    _, merged = run_merge(base, several, tmp_path / "merged")

    assert equals_peft(base, several, merged.root)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "magnitude_prune"])
def test_conv1d_equals_peft(kind: str, tmp_path: Path) -> None:
    base = models.save_base(models.gpt2(), tmp_path / "base", dtype=torch.bfloat16)
    config = _lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    several = Several(paths=save_all(base, tmp_path, config, config), combination=combination(kind, 0.7, -0.4))

    _, merged = run_merge(base, several, tmp_path / "merged")

    assert equals_peft(base, several, merged.root)


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


def _sum_of_deltas(several: Several) -> dict[str, torch.Tensor]:
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


def _defined(several: Several, rank: int) -> dict[str, torch.Tensor]:
    """Return the delta of every module by the kind's definition (docs/several-adapters.md)."""
    kind, weights, density = several.combination.kind, several.combination.weights, several.combination.density or 1.0
    if kind == "cat":
        return _sum_of_deltas(several)
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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in RANDOM])
@pytest.mark.parametrize("weights", [(0.7, 0.4), (0.7, -0.4)], ids=str)
def test_every_kind_is_what_its_definition_says(
    kind: str, weights: tuple[float, float], base: Path, pair: tuple[Path, ...], tmp_path: Path
) -> None:
    several = Several(paths=pair, combination=combination(kind, *weights))

    _, merged = run_merge(base, several, tmp_path / "merged", dtype="float32")

    before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
    for module, delta in _defined(several, rank=4).items():
        found = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        assert float((found - delta).norm() / delta.norm()) < 1e-5, module


def test_only_cat_is_the_sum_of_the_deltas(base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    errors = {}
    for kind in ("cat", "linear", "svd"):
        several = Several(paths=pair, combination=combination(kind, 1.0, 1.0))
        _, merged = run_merge(base, several, tmp_path / kind, dtype="float32")
        before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
        errors[kind] = max(
            float((after[f"{module}.weight"].double() - before[f"{module}.weight"].double() - delta).norm())
            / float(delta.norm())
            for module, delta in _sum_of_deltas(several).items()
        )

    assert errors["cat"] < 1e-5
    assert errors["linear"] > 0.5
    assert 0.01 < errors["svd"] < 0.9


def _check_sum(base: Path, several: Several, merged: Path) -> None:
    before, after = oracle.read_folder(base), oracle.read_folder(merged)
    wanted = _sum_of_deltas(several)
    for name, tensor in before.items():
        found = after[name].double() - tensor.double()
        delta = wanted.pop(name.removesuffix(".weight"), torch.zeros_like(found))
        assert float((found - delta).norm()) <= 1e-5 * float(delta.norm()), name
    assert not wanted


def test_rslora_is_scaled_once_where_peft_scales_it_twice(base: Path, tmp_path: Path) -> None:
    adapters = save_all(base, tmp_path, _lora(use_rslora=True), _lora(use_rslora=True))
    several = Several(paths=adapters, combination=combination("cat", 1.0, 1.0))

    _, merged = run_merge(base, several, tmp_path / "merged", dtype="float32")

    _check_sum(base, several, merged.root)
    assert not equals_peft(base, several, merged.root), "PEFT has repaired this: make it an equality"


@pytest.mark.parametrize(
    "first, second",
    [
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {"layers_to_transform": [1]}),
        ({"exclude_modules": ["v_proj"]}, {}),
    ],
)
def test_no_module_of_the_second_adapter_is_lost_where_peft_loses_it(
    first: dict[str, object], second: dict[str, object], base: Path, tmp_path: Path
) -> None:
    adapters = save_all(base, tmp_path, _lora(**first), _lora(**second))
    several = Several(paths=adapters, combination=combination("cat", 0.7, -0.4))

    _, merged = run_merge(base, several, tmp_path / "merged", dtype="float32")

    _check_sum(base, several, merged.root)
    assert not equals_peft(base, several, merged.root), "PEFT has repaired this: make it an equality"


def test_lists_and_expressions_of_modules_are_combined_where_peft_refuses(base: Path, tmp_path: Path) -> None:
    adapters = save_all(base, tmp_path, _lora(target_modules=r".*\.0\..*q_proj"), _lora(target_modules=["v_proj"]))
    several = Several(paths=adapters, combination=combination("cat", 1.0, 1.0))

    _, merged = run_merge(base, several, tmp_path / "merged", dtype="float32")

    _check_sum(base, several, merged.root)
    with pytest.raises(ValueError, match="target modules type"):
        peft_combination(base, several)


@pytest.mark.parametrize("kind", RANDOM)
def test_dare_depends_on_its_seed_alone(kind: str, base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    digests = []
    for number, (seed, threads) in enumerate([(5, 1), (5, 2), (6, 1)]):
        torch.manual_seed(number)
        torch.set_num_threads(threads)
        several = Several(paths=pair, combination=combination(kind, 0.7, -0.4, seed=seed))
        digests.append(run_merge(base, several, tmp_path / str(number))[1].digest)

    assert digests[0] == digests[1] != digests[2]


REFUSED: Mapping[str, dict[str, object]] = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "ensure_weight_tying": {"ensure_weight_tying": True, "target_modules": ["embed_tokens"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "use_qalora": {"use_qalora": True},
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_would_drop_is_refused_by_name(name: str, place: int, tmp_path: Path) -> None:
    base = models.save_base(models.qwen2(), tmp_path / "base", dtype=torch.bfloat16)
    configs = [_lora(target_modules=["q_proj"]), _lora(target_modules=["q_proj"])]
    configs[place] = _lora(**{"target_modules": ["q_proj"], **REFUSED[name]})
    several = Several(paths=save_all(base, tmp_path, *configs), combination=combination("cat", 1.0, 1.0))

    with pytest.raises(UnsupportedAdapter, match=f"Adapter {place + 1} .*{name}"):
        run_merge(base, several, tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_a_field_that_nobody_foresaw_is_refused(base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    several = Several(
        paths=(_edited(pair[0], tmp_path / "other", use_novelty=True), pair[1]),
        combination=combination("cat", 1.0, 1.0),
    )

    with pytest.raises(UnsupportedAdapter, match="use_novelty"):
        run_merge(base, several, tmp_path / "merged")


def _edited(adapter: Path, folder: Path, **fields: object) -> Path:
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").symlink_to(adapter / "adapter_model.safetensors")
    return folder


def test_adapters_of_different_bases_are_refused(base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    other = _edited(pair[1], tmp_path / "other", base_model_name_or_path="somebody/else")

    with pytest.raises(AdapterMismatch, match="'somebody/else'"):
        run_merge(base, Several(paths=(pair[0], other), combination=combination("cat", 1.0, 1.0)), tmp_path / "merged")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cat" and not kind.endswith("svd")])
@pytest.mark.parametrize("second", [{"r": 2}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_kinds_that_add_factors_refuse_different_ranks(
    kind: str, second: dict[str, object], base: Path, tmp_path: Path
) -> None:
    adapters = save_all(base, tmp_path, _lora(), _lora(**second))

    with pytest.raises(AdapterMismatch, match=r"rank.* 2"):
        run_merge(base, Several(paths=adapters, combination=combination(kind, 1.0, 1.0)), tmp_path / "merged")


def test_a_method_that_is_no_lora_is_refused(base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    import peft

    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    other = models.save_adapter(base, tmp_path / "ia3", config)

    with pytest.raises(UnsupportedAdapter, match="Adapter 2 is of type IA3"):
        run_merge(base, Several(paths=(pair[0], other), combination=combination("cat", 1.0, 1.0)), tmp_path / "merged")


def test_tokenizers_that_differ_are_told(base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    paths = tuple(_edited(path, tmp_path / f"copy{number}") for number, path in enumerate(pair))
    for number, path in enumerate(paths):
        (path / "tokenizer.json").write_text(json.dumps({"number": number}))

    plan, merged = run_merge(base, Several(paths=paths, combination=combination("cat", 1.0, 1.0)), tmp_path / "merged")

    assert any("Adapter 2 carries other tokenizer files" in note for note in plan.summary.notes)
    assert json.loads((merged.root / "tokenizer.json").read_text()) == {"number": 0}
