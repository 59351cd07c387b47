"""Several adapters as the one that they must act like: a folder that the rest of the judge reads as any adapter.

`linear` and `cat` have a closed form, which is computed here in float64 from the adapters' own files and rounded once.
For the other kinds PEFT is asked to combine them again, on a load of its own with the same seed, and its factors are
taken as they are (docs/verification.md says what that proves). The base is not read for either: the factors hang on a
model of the base's class whose weights take no memory.

The rank of that one adapter is larger than needed, by rows of zeros. They change nothing but the judge's bound on a
right float32 computation, which grows with the rank (`runner.judge.expected.exact`): the roundings of the combination
itself, ROUNDINGS for each adapter, belong to a right merge, too; and the last digits of singular vectors depend on the
processor.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from runner.judge.expected.classes import empty_model, read_task
from runner.judge.expected.naming import as_peft_names
from runner.judge.expected.parts import Blocks, combine_by_peft, held_parts, load_parts
from runner.judge.expected.recipe import CONFIG_FILE, PREFIX, WEIGHTS_FILE, LowRank, Recipe, read_recipe
from runner.judge.numbers.tensors import read_tensor
from runner.protocol.combination import Combination, Several
from runner.protocol.errors import UnsupportedAdapter
from runner.protocol.verdict import Check, Layer, Outcome

LIMIT = 1e-6
PROBES = 4
ROUNDINGS = 4
SVD_ROOM = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of several adapters, for the diagnosis of a wrong merge.

    Attributes:
        recipe: the adapter, read.
        weight: that it is combined with.
        crosses: whether its B meets the other adapters' A, as in `linear`.
    """

    recipe: Recipe
    weight: float
    crosses: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class One:
    """What several adapters must act like.

    Attributes:
        root: an adapter folder, which lives as long as the context that gave it.
        checks: what was found while it was made.
        parts: the adapters, where their combination has a closed form.
    """

    root: Path
    checks: tuple[Check, ...]
    parts: tuple[Part, ...] = ()


@contextmanager
def as_one(adapter: Path | Several, base: Path) -> Iterator[One]:
    """Give the folder of one adapter: the adapter's own, or one that acts as the several do.

    Args:
        adapter: one folder, or several and how they are combined.
        base: the base's folder; only its config is read.

    Raises:
        AdapterMismatch: PEFT cannot put an adapter on the base, or cannot combine them.
        UnsupportedAdapter: an adapter holds more than low-rank factors, which no combination keeps.
    """
    with ExitStack() as stack:
        paths = adapter.paths if isinstance(adapter, Several) else (adapter,)
        named = [stack.enter_context(as_peft_names(path, read_task(base, path).empty(base))) for path in paths]
        if isinstance(adapter, Several):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-merge-")))
            yield _combined(folder, named, adapter.combination, empty_model(base))
        else:
            yield One(root=named[0], checks=())


def _combined(folder: Path, paths: Sequence[Path], wanted: Combination, model: PreTrainedModel) -> One:
    """Write the one adapter into `folder` and return it."""
    recipes = [_read(path, list(model.state_dict())) for path in paths]
    peft_model = load_parts(model, paths)
    checks: tuple[Check, ...] = ()
    if wanted.kind == "cat":
        made = _weighted_sum(recipes, wanted.weights)
        checks = (_compare(made, held_parts(peft_model, wanted.weights)),)
    elif wanted.kind == "linear":
        made = _weighted_factors(recipes, wanted.weights)
        checks = (_compare(made, combine_by_peft(peft_model, wanted)),)
    else:
        made = combine_by_peft(peft_model, wanted)
    room = ROUNDINGS * len(recipes) + (SVD_ROOM if wanted.kind.endswith("svd") else 0)
    _write(folder, made, recipes, room)
    is_closed = wanted.kind in ("cat", "linear")
    parts = tuple(
        Part(recipe=recipe, weight=weight, crosses=wanted.kind == "linear")
        for recipe, weight in zip(recipes, wanted.weights, strict=True)
    )
    return One(root=folder, checks=checks, parts=parts if is_closed else ())


def _read(root: Path, parameters: Sequence[str]) -> Recipe:
    recipe = read_recipe(root, parameters)
    rest = [*recipe.others, *(key for key, rule in recipe.rules.items() if not isinstance(rule, LowRank))]
    if rest:
        raise UnsupportedAdapter(
            f"An adapter brings {rest[0]!r}, and several adapters are to be combined.",
            why="Only low-rank factors can be combined; the judge has no meaning for anything else.",
            fix="Judge a merge of this adapter alone.",
        )
    return recipe


def _weighted_sum(recipes: Sequence[Recipe], weights: Sequence[float]) -> Mapping[str, Blocks]:
    """Return Σ w·s·B·A of every module: what `cat` means."""
    made: dict[str, Blocks] = {}
    for recipe, weight in zip(recipes, weights, strict=True):
        for key, rule in _low_rank(recipe):
            a, b = _factors(recipe, rule)
            made.setdefault(key.removesuffix(".weight"), []).append((b, weight * rule.scaling * a))
    return made


def _weighted_factors(recipes: Sequence[Recipe], weights: Sequence[float]) -> Mapping[str, Blocks]:
    """Return (Σ β·B)·(Σ α·A) of every module, product by product: what `linear` means.

    α and β are √|w·s|, and α has the sign of w·s. The products are kept apart so that the bound on a float32
    computation sees what was added before anything cancelled.
    """
    sides: dict[str, Blocks] = {}
    for recipe, weight in zip(recipes, weights, strict=True):
        for key, rule in _low_rank(recipe):
            a, b = _factors(recipe, rule)
            share = weight * rule.scaling
            root = math.sqrt(abs(share))
            sides.setdefault(key.removesuffix(".weight"), []).append((root * b, math.copysign(root, share) * a))
    return {module: [(b, a) for b, _ in pairs for _, a in pairs] for module, pairs in sides.items()}


def _low_rank(recipe: Recipe) -> Iterator[tuple[str, LowRank]]:
    yield from ((key, rule) for key, rule in recipe.rules.items() if isinstance(rule, LowRank))


def _factors(recipe: Recipe, rule: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (read_tensor(recipe.root, recipe.tensors[name]).double() for name in (rule.a, rule.b))
    return a, b


def _compare(made: Mapping[str, Blocks], wanted: Mapping[str, Blocks]) -> Check:
    """Check the closed form against PEFT's layers: both on random vectors, relative to what each block gives."""
    worst, where = 0.0, ""
    if made.keys() != wanted.keys():
        worst, where = math.inf, min(made.keys() ^ wanted.keys())
    generator = torch.Generator().manual_seed(0)
    for module in made.keys() & wanted.keys():
        width = made[module][0][1].shape[1]
        probe = torch.randint(0, 2, (width, PROBES), generator=generator).double() * 2 - 1
        ours, theirs = _act(made[module], probe), _act(wanted[module], probe)
        size = sum(float((b @ (a @ probe)).norm()) for b, a in made[module])
        error = float((ours - theirs).norm()) / size if size > 0 else 0.0
        if not error <= worst:
            worst, where = error, module
    return Check(
        layer=Layer.SEMANTICS,
        name="the combination is what PEFT's layers make of the adapters",
        outcome=Outcome.PASS if worst <= LIMIT else Outcome.FAIL,
        value=worst,
        limit=LIMIT,
        detail="" if worst <= LIMIT else f"The worst module is {where}.",
    )


def _act(blocks: Blocks, probe: torch.Tensor) -> torch.Tensor:
    return torch.stack([b @ (a @ probe) for b, a in blocks]).sum(dim=0)


def _write(folder: Path, made: Mapping[str, Blocks], recipes: Sequence[Recipe], room: int) -> None:
    """Write the adapter folder; every other file in it is the first adapter's."""
    for path in recipes[0].root.iterdir():
        if path.is_file() and path.name not in (CONFIG_FILE, WEIGHTS_FILE):
            (folder / path.name).symlink_to(path.resolve())
    rank = max(sum(a.shape[0] for _, a in blocks) for blocks in made.values()) + room
    rules = {key.removesuffix(".weight"): (recipe, rule) for recipe in recipes for key, rule in _low_rank(recipe)}
    tensors: dict[str, torch.Tensor] = {}
    for module, blocks in made.items():
        a = torch.zeros(rank, blocks[0][1].shape[1])
        b = torch.zeros(blocks[0][0].shape[0], rank)
        filled = sum(part.shape[0] for _, part in blocks)
        a[:filled], b[:, :filled] = torch.cat([part for _, part in blocks]), torch.cat([part for part, _ in blocks], 1)
        recipe, rule = rules[module]
        names = ("lora_embedding_A", "lora_embedding_B") if rule.is_embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{module}.{name}": factor for name, factor in zip(names, (a, b), strict=True)}
        if rule.replaced_base is not None:  # PEFT's copy of the base beside an embedding's factors
            tensors[rule.replaced_base] = read_tensor(recipe.root, recipe.tensors[rule.replaced_base])
    config = {
        "peft_type": "LORA",
        "task_type": recipes[0].config.get("task_type"),
        "base_model_name_or_path": recipes[0].config.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": "|".join(map(re.escape, made)),
        "fan_in_fan_out": recipes[0].config.get("fan_in_fan_out", False),
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file(tensors, str(folder / WEIGHTS_FILE))
