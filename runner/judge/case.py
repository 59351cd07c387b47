"""A case: base and adapter, read, loaded and understood; all that the judge knows before it sees a merged folder.

One case judges any number of merged folders. Semantics belongs to it, because it does not look at the folder either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.files.formats import check_plain
from runner.files.layout import Checkpoint, read_checkpoint
from runner.judge.expected.blueprint import Blueprint, check_heads, read_blueprint
from runner.judge.expected.classes import read_task
from runner.judge.expected.combined import Part, as_one
from runner.judge.expected.packing import as_peft_packs
from runner.judge.expected.recipe import Recipe, read_recipe
from runner.judge.expected.renamed import may_lack
from runner.judge.expected.shapes import resized_rows
from runner.judge.expected.sources import Sources
from runner.judge.expected.targets import Target, Targets, find_targets
from runner.judge.expected.unmerged import Unmerged, load_base, load_unmerged
from runner.judge.semantics import LIMIT, Probe, probe_modules
from runner.judge.structure import Form, Wanted, read_json
from runner.protocol.combination import Several
from runner.protocol.rounding import Rounding
from runner.protocol.verdict import Check, Layer, Outcome

Progress = Callable[[str, float], None]

# Those of decoders whose encoder hears are targets (Whisper, Speech2Text); LED has one for each side.
_WINDOWS = (
    "max_position_embeddings", "max_seq_len", "max_target_positions", "max_decoder_position_embeddings",
    "max_encoder_position_embeddings",
)  # fmt: skip
UNREAD_IDS = 1000  # token ids of a model that reads none: they number its sounds or pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Base and adapter, ready to judge merges of them.

    Attributes:
        base: the base on disk.
        adapter: folder of the adapter, or of the one that several act like.
        sides: folders of the adapters as they were given; a release may take files of the first.
        dtype: what the merge was asked for.
        seed: of all random probes and token ids.
        blueprint: the model class.
        recipe: the adapter, read.
        unmerged: the reference model.
        sources: E of every touched parameter.
        targets: what a merged folder must hold.
        rows: the vocabulary's size where the adapter changes it, else None.
        config: keys of config.json that must have these values.
        combination: what was found while several adapters were made one.
        parts: those adapters, where their combination has a closed form.
        probes: what probing every module gave.
    """

    base: Checkpoint
    adapter: Path
    sides: tuple[Path, ...]
    dtype: str
    seed: int
    blueprint: Blueprint
    recipe: Recipe
    unmerged: Unmerged
    sources: Sources
    targets: Targets
    rows: int | None
    config: Mapping[str, Any]
    combination: tuple[Check, ...]
    parts: tuple[Part, ...]
    probes: tuple[Probe, ...]

    def form(self, merged: Checkpoint) -> Form:
        """Return what the structure of `merged` must be."""
        targets = self.targets
        has_copies = bool(targets.optional) and targets.optional.keys() <= merged.tensors.keys()
        return Form(
            required={name: _wanted(target) for name, target in targets.required.items()},
            optional={name: _wanted(target) for name, target in targets.optional.items()},
            dtype=self.dtype,
            is_untied=bool(targets.untied),
            may_untie=bool(targets.untied) or has_copies,
            rows=self.rows,
            config=self.config,
            may_lack=may_lack(targets, self.blueprint),
        )

    @property
    def embedding_rows(self) -> int:
        """How many tokens the reference can read, and count among its answers; `UNREAD_IDS` where it reads no text.

        Mllama's input embedding has rows for pictures that its head has not.
        """
        model = self.unmerged.model.get_base_model()
        try:
            found = [model.get_input_embeddings(), model.get_output_embeddings()]
        except NotImplementedError:  # transformers knows of none
            return UNREAD_IDS
        rows = [weight.shape[0] if weight is not None and weight.ndim == 2 else 0 for weight in map(_weight, found)]
        return min(int(count) for count in rows if count) if rows[0] else UNREAD_IDS

    @property
    def max_tokens(self) -> int:
        """How many tokens of a text the model can take; windows have several names in configs."""
        config = self.unmerged.base.model.config.get_text_config()
        limits = [getattr(config, name, None) for name in _WINDOWS]
        return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=1 << 20)

    def semantics(self) -> tuple[Check, ...]:
        """Return the checks of the semantics layer."""
        return (*self.combination, *judge_semantics(self.probes, self.unmerged))


@contextmanager
def open_case(
    base: Path,
    adapter: Path | Several,
    *,
    dtype: str,
    rounding: Rounding | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Iterator[Case]:
    """Give the case of `adapter` on `base`; see `runner.judge.judge.judge` for the arguments.

    Raises:
        CheckpointError: the base cannot be used.
        AdapterError: the adapter cannot be used, or is not for this base.
    """
    say: Progress = on_progress or (lambda _what, _share: None)
    say("reading", 0.0)
    checkpoint = read_checkpoint(base)
    check_plain(read_json(base / "config.json") or {}, checkpoint.tensors)
    say("loading base and adapter", 0.02)
    with as_one(adapter, base) as one:
        task = read_task(checkpoint.root, one.root)
        blueprint = read_blueprint(checkpoint.root, checkpoint.tensors, task)
        recipe = read_recipe(one.root, list(blueprint.keys), blueprint.conversion.sources)
        rows = resized_rows(recipe, blueprint)
        check_heads(blueprint, recipe)
        loaded = load_base(checkpoint.root, rows, wanted=task.model_class, labels=task.labels)
        with as_peft_packs(recipe, lambda: task.empty(checkpoint.root)) as packed:
            unmerged = load_unmerged(loaded, packed, recipe.redundant)
        sources = Sources(base=checkpoint, blueprint=blueprint, recipe=recipe, unmerged=unmerged)
        targets = find_targets(
            sources, base=checkpoint, blueprint=blueprint, dtype=dtype, rounding=rounding or Rounding()
        )
        say("semantics", 0.08)
        yield Case(
            base=checkpoint,
            adapter=one.root,
            sides=tuple(adapter.paths) if isinstance(adapter, Several) else (adapter,),
            dtype=dtype,
            seed=seed,
            blueprint=blueprint,
            recipe=recipe,
            unmerged=unmerged,
            sources=sources,
            targets=targets,
            rows=rows,
            config=task.config,
            combination=one.checks,
            parts=one.parts,
            probes=tuple(probe_modules(unmerged, sources, seed)),
        )


def _weight(module: Any) -> Any:
    return getattr(module, "weight", None)


def judge_semantics(probes: Sequence[Probe], unmerged: Unmerged) -> tuple[Check, ...]:
    """Return what the probes say, as checks."""
    name = "E does what PEFT's unmerged layer does"
    exact = "PEFT holds the adapter exactly as stored"
    altered = f"{unmerged.altered[0]} has other values in PEFT's model than in the file." if unmerged.altered else ""
    outcome = Outcome.FAIL if altered else Outcome.PASS
    checks = [Check(layer=Layer.SEMANTICS, name=exact, outcome=outcome, detail=altered)]
    errors = [(probe.error, probe) for probe in probes if probe.error is not None]
    blind = [probe for probe in probes if probe.error is None]
    if errors:
        worst, probe = max(errors, key=lambda entry: math.inf if math.isnan(entry[0]) else entry[0])
        passed = worst <= LIMIT
        checks.append(
            Check(
                layer=Layer.SEMANTICS,
                name=name,
                outcome=Outcome.PASS if passed else Outcome.FAIL,
                value=worst,
                limit=LIMIT,
                detail=""
                if passed
                else f"The worst of {len(errors)} modules is {probe.module}. {probe.detail}".strip(),
            )
        )
    if blind or not errors:
        first = f"{blind[0].module}: {blind[0].detail}" if blind else "PEFT touches no module"
        checks.append(skipped(Layer.SEMANTICS, f"{len(blind)} modules were not probed; {first}"))
    return tuple(checks)


def skipped(layer: Layer, reason: str) -> Check:
    """Return the check of a layer that did not run, or not wholly."""
    return Check(layer=layer, name=f"{layer.value} was judged", outcome=Outcome.SKIPPED, detail=f"{reason}.")


def _wanted(target: Target) -> Wanted:
    return Wanted(dtype=target.dtype, shape=target.shape)
