"""The judge's own reading of an adapter is itself judged: a wrong one disagrees with PEFT's unmerged layer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.files.layout import read_checkpoint
from runner.judge.expected.blueprint import read_blueprint
from runner.judge.expected.classes import read_task
from runner.judge.expected.recipe import Copy, LowRank, Recipe, Rule, Shift, read_recipe, scaling_of
from runner.judge.expected.shapes import resized_rows
from runner.judge.expected.sources import Sources
from runner.judge.expected.unmerged import load_base, load_unmerged
from runner.judge.judge import judge
from runner.judge.semantics import LIMIT, Probe, probe_modules
from runner.protocol.errors import AdapterMismatch, BrokenAdapter, BrokenCheckpoint
from tests.judge.conftest import Maker
from tests.judge.tiny import lora, save_adapter
from tests.judge.variants import LORA, TIED

WEIGHTS = "adapter_model.safetensors"
Change = Callable[[Rule], Rule]


def _probes(base: Path, adapter: Path, change: Change | None = None) -> list[Probe]:
    """Probe with the judge's rules changed by `change`."""
    checkpoint = read_checkpoint(base)
    blueprint = read_blueprint(base, checkpoint.tensors, read_task(base, adapter))
    recipe = read_recipe(adapter, list(blueprint.keys))
    unmerged = load_unmerged(load_base(base, resized_rows(recipe, blueprint)), adapter, recipe.redundant)
    if change is not None:
        recipe = _changed(recipe, change)
    sources = Sources(base=checkpoint, blueprint=blueprint, recipe=recipe, unmerged=unmerged)
    return list(probe_modules(unmerged, sources, seed=3))


def _changed(recipe: Recipe, change: Change) -> Recipe:
    return dataclasses.replace(recipe, rules={key: change(rule) for key, rule in recipe.rules.items()})


def _louder(rule: Rule) -> Rule:
    return rule if isinstance(rule, Copy) else dataclasses.replace(rule, scaling=rule.scaling * 1.02)


@pytest.mark.parametrize("variant", [*LORA, *TIED])
def test_the_judges_own_formula_agrees_with_peft_layer_by_layer(right_merge: Maker, variant: str) -> None:
    base, adapter, _ = right_merge(variant)
    probes = _probes(base, adapter)
    assert probes
    for probe in probes:
        assert probe.error is not None, probe
        assert probe.error <= 1e-9, probe


@pytest.mark.parametrize("variant", ["lora", "rslora", "patterns", "lora_bias", "conv1d", "embeddings", "tied_head"])
def test_a_factor_off_by_two_percent_is_two_percent_of_error(right_merge: Maker, variant: str) -> None:
    base, adapter, _ = right_merge(variant)
    errors = [probe.error for probe in _probes(base, adapter, _louder)]
    assert max(error for error in errors if error is not None) == pytest.approx(0.02, rel=1e-3)


def test_a_weak_adapter_hides_no_wrong_factor_from_the_probes(weak: tuple[Path, Path, Path]) -> None:
    base, adapter, _ = weak
    assert all(probe.error is not None and probe.error < LIMIT for probe in _probes(base, adapter))
    assert all(
        probe.error is not None and probe.error == pytest.approx(0.02, rel=1e-3)
        for probe in _probes(base, adapter, _louder)
    )


def test_a_saved_module_read_from_the_wrong_tensor_is_seen(right_merge: Maker) -> None:
    base, adapter, _ = right_merge("saved_modules")
    names = ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]

    def swap(rule: Rule) -> Rule:
        return Copy(tensor=names[1 - names.index(rule.tensor)]) if isinstance(rule, Copy) else rule

    probes = {probe.module: probe.error for probe in _probes(base, adapter, swap)}
    assert probes["lm_head"] == math.inf
    assert probes["model.embed_tokens"] == math.inf


def test_an_adapter_without_effect_divides_by_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    from tests.judge.merges import save_merge

    adapter = save_adapter(tmp_path / "adapter", bases["llama"], lora())
    weights = load_file(adapter / WEIGHTS)
    save_file({name: torch.zeros_like(weight) for name, weight in weights.items()}, adapter / WEIGHTS)
    assert all(probe.error == 0.0 for probe in _probes(bases["llama"], adapter))
    merged = save_merge(tmp_path / "merged", bases["llama"], adapter)
    verdict = judge(base=bases["llama"], adapter=adapter, merged=merged, dtype="auto")
    assert [check.name for check in verdict.failures] == ["the adapter's change is in the files"]
    assert any("No power" in check.detail for check in verdict.checks)


def test_scaling_follows_pefts_own_layers(right_merge: Maker) -> None:
    for variant in ("lora", "rslora", "patterns"):
        base, adapter, _ = right_merge(variant)
        config = json.loads((adapter / "adapter_config.json").read_bytes())
        unmerged = load_unmerged(load_base(base, None), adapter, ())
        for path, unit in unmerged.units.items():
            layer = getattr(unit, "scaling")  # noqa: B009  (a Module's attributes are tensors or modules to mypy)
            assert scaling_of(path, config) == layer["default"]


def test_reads_every_kind_of_rule(right_merge: Maker) -> None:
    rules: list[Rule] = []
    for variant in ("lora_bias", "bias_lora_only", "embeddings", "saved_modules"):
        base, adapter, _ = right_merge(variant)
        blueprint = read_blueprint(base, read_checkpoint(base).tensors, read_task(base, adapter))
        recipe = read_recipe(adapter, list(blueprint.keys))
        assert recipe.others == ()
        rules.extend(recipe.rules.values())
    assert {type(rule) for rule in rules} == {LowRank, Shift, Copy}
    assert any(isinstance(rule, LowRank) and rule.is_embedding and rule.replaced_base for rule in rules)


def test_refuses_half_a_pair(right_merge: Maker, copy_of: Callable[[Path], Path]) -> None:
    base, adapter, merged = right_merge("lora")
    spoiled = copy_of(adapter)
    weights = load_file(spoiled / WEIGHTS)
    weights.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(weights, spoiled / WEIGHTS)
    with pytest.raises(BrokenAdapter, match="both halves"):
        judge(base=base, adapter=spoiled, merged=merged, dtype="auto")


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_refuses_an_adapter_that_is_not_whole(right_merge: Maker, copy_of: Callable[[Path], Path], name: str) -> None:
    base, adapter, merged = right_merge("lora")
    spoiled = copy_of(adapter)
    (spoiled / name).unlink()
    with pytest.raises(BrokenAdapter):
        judge(base=base, adapter=spoiled, merged=merged, dtype="auto")


def test_refuses_an_adapter_for_another_base(right_merge: Maker) -> None:
    base, _, merged = right_merge("lora")
    _, adapter, _ = right_merge("conv1d")
    with pytest.raises(AdapterMismatch):
        judge(base=base, adapter=adapter, merged=merged, dtype="auto")


def test_refuses_a_base_that_is_not_whole(right_merge: Maker, copy_of: Callable[[Path], Path]) -> None:
    base, adapter, merged = right_merge("lora")
    spoiled = copy_of(base)
    (spoiled / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint):
        judge(base=spoiled, adapter=adapter, merged=merged, dtype="auto")
