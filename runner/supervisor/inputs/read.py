"""What the user asked for: `INPUT_*` variables or flags in, one checked `Inputs` out, or every problem at once.

Covered: spelling, closed sets, combinations, local folders and files that must exist.
Not covered: anything that needs the network, the weights or the machine (hub, adapter, plan, launch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from runner.protocol.allow import Allow
from runner.protocol.combination import Combination
from runner.protocol.errors import InputError, Problem
from runner.protocol.limits import Evaluation, Limits
from runner.protocol.repo_ref import RepoRef
from runner.protocol.rounding import Rounding
from runner.protocol.syntax import revision_problem
from runner.supervisor.inputs import sources
from runner.supervisor.inputs.declared import INPUTS
from runner.supervisor.inputs.form import Form
from runner.supervisor.inputs.machine import Machine, read_machine
from runner.supervisor.inputs.placement import Placement, check_placement, check_sources, read_placement
from runner.supervisor.inputs.verify_options import read_evaluation, read_limits, read_rounding
from runner.supervisor.inputs.workspace import Workspace
from runner.supervisor.signature import SigningKey

IDENTITY_URL = "ACTIONS_ID_TOKEN_REQUEST_URL"
IDENTITY_TOKEN = "ACTIONS_ID_TOKEN_REQUEST_TOKEN"  # noqa: S105 (the name of a variable)

__all__ = ["INPUTS", "Inputs", "RepoRef", "given_secrets", "parse", "usage", "wants_help"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that the user decides.

    Attributes:
        adapters: what to merge, at least one.
        combination: how several adapters become one; None exactly when there is one.
        base: into what; None for the base that the adapter's config names.
        base_revision: asked for by the user; part of `base` too where that is given.
        allow: what is refused unless it is allowed by name.
        placement: where the release goes; a repository or a folder whenever `mode` is publish.
        tag: set whenever `mode` is publish.
        mode: publish, verify or plan.
        merged: what to judge; set exactly when `mode` is verify.
        dtype: of the merged weights.
        rounding: of the values that the adapter changes.
        device: of the worker.
        machine: where the worker runs, and how long.
        hf_token: set whenever `mode` is publish, unless the release goes to a folder or the job `is_keyless`.
        base_token: for reading; the same as `hf_token` unless another is given.
        signing_key: of the release's signature, or None for none.
        is_keyless: whether the job gets its token as a trusted publisher.
        private: for a repository that is created.
        work_dir: absolute, or None for a temporary one.
        report_dir: absolute.
        cache_dir: absolute, or None for none.
        verify_prompts: literal text, or the JSON text of an object with `messages` (see
            `runner.supervisor.inputs.prompts`).
        limits: of the judgement, loosened or set.
        evaluation: on a text of the user's own.
        commit_message: may have several lines.
        on_existing_tag: fail, skip or replace.
        workspace: where relative paths start.
    """

    adapters: tuple[RepoRef, ...]
    combination: Combination | None
    base: RepoRef | None
    base_revision: str | None
    allow: Allow
    placement: Placement
    tag: str | None
    mode: Literal["publish", "verify", "plan"]
    merged: RepoRef | None
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    rounding: Rounding
    device: Literal["auto", "cuda", "cpu"]
    machine: Machine
    hf_token: str | None = field(repr=False)
    base_token: str | None = field(repr=False)
    signing_key: SigningKey | None
    is_keyless: bool
    private: bool
    work_dir: Path | None
    report_dir: Path
    cache_dir: Path | None
    verify_prompts: tuple[str, ...]
    limits: Limits
    evaluation: Evaluation
    commit_message: str | None
    on_existing_tag: Literal["fail", "skip", "replace"]
    workspace: Workspace

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be shown."""
        key = self.signing_key.pem if self.signing_key else None
        return tuple(sorted({secret for secret in (self.hf_token, self.base_token, key) if secret}))

    def public(self) -> dict[str, str | bool | int]:
        """Return every input that may be shown, in the order of `action.yml`; "" where none was given.

        Paths inside the workspace are relative to it; of the prompts only their number is told, and of
        the text for the perplexity its length in characters.
        """

        def model(ref: RepoRef | None) -> str:
            return "" if ref is None else self.workspace.show(ref.path) if ref.path else ref.display

        def folder(path: Path | None) -> str:
            return "" if path is None else self.workspace.show(path)

        wanted, machine = self.combination, self.machine.public()
        place = self.placement.public(folder(self.placement.folder))
        weighted = zip(self.adapters, wanted.weights if wanted else (1.0,) * len(self.adapters), strict=True)
        return {
            "adapter-path": "\n".join(
                model(ref) if wanted is None else f"{model(ref)} {weight!r}" for ref, weight in weighted
            ),
            "combination": wanted.kind if wanted else "",
            "combination-density": repr(wanted.density) if wanted and wanted.density is not None else "",
            "combination-seed": str(wanted.seed) if wanted and wanted.seed is not None else "",
            "combination-majority-sign": (wanted.majority_sign or "") if wanted else "",
            "target-repo": place.pop("target-repo"),
            "target-revision": place.pop("target-revision"),
            "base-model": model(self.base),
            "base-revision": self.base_revision or "",
            "allow": "\n".join(self.allow.entries),
            "tag": self.tag or "",
            "also-tags": place.pop("also-tags"),
            "mode": self.mode,
            "merged-path": model(self.merged),
            "dtype": self.dtype,
            "rounding": self.rounding.kind,
            "rounding-seed": "" if self.rounding.seed is None else str(self.rounding.seed),
            "device": self.device,
            **{name: machine[name] for name in ("executor", "gpus", "min-free-vram", "gpu-wait-timeout")},
            "private": self.private,
            "work-dir": folder(self.work_dir),
            "report-dir": folder(self.report_dir),
            "cache-dir": folder(self.cache_dir),
            "phase-timeout-minutes": machine["phase-timeout-minutes"],
            "verify-prompts": len(self.verify_prompts),
            "verify-tolerance": " ".join(f"{loosened.layer}={loosened.limit!r}" for loosened in self.limits.tolerances),
            "quality-limits": " ".join(limit.text for limit in self.limits.quality),
            "eval-text": len(self.evaluation.text),
            "eval-tasks": "",  # there for readers of reports
            "commit-message": self.commit_message or "",
            "on-existing-tag": self.on_existing_tag,
            **place,
        }


def wants_help(argv: Sequence[str]) -> bool:
    """Return whether the user asks for `usage` instead of a run."""
    return bool({"--help", "-h"} & set(argv))


def usage() -> str:
    """Return the text of `--help`."""
    return sources.usage(INPUTS)


def given_secrets(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return every token in the environment, checked or not: to be masked before anything is printed."""
    variables = [name for spec in INPUTS if spec.secret for name in spec.variables] + [IDENTITY_TOKEN]
    return tuple(sorted({token for name in variables if (token := environ.get(name, "").strip())}))


def parse(
    environ: Mapping[str, str],
    argv: Sequence[str],
    *,
    event_tag: str | None = None,
    event_problems: Sequence[Problem] = (),
) -> Inputs:
    """Return the checked inputs of this run.

    Args:
        environ: the process's environment.
        argv: arguments without the program's name.
        event_tag: the tag that the workflow's event names, used where the input is empty.
        event_problems: why this event may not publish; they count if the mode is publish.

    Raises:
        InputError: with every problem there is.
    """
    values, problems = sources.collect(INPUTS, environ, argv, in_github=environ.get("GITHUB_ACTIONS") == "true")
    form = Form(values=values, problems=problems, workspace=Workspace.of(environ))
    mode = cast(Literal["publish", "verify", "plan"], form.choice("mode"))
    hf_token = values.get("hf-token") or None
    base_revision = form.checked("base-revision", revision_problem, "a revision")
    adapters = form.adapters("adapter-path")
    allow = form.allow("allow")
    placement = read_placement(form)
    inputs = Inputs(
        adapters=tuple(ref for ref, _ in adapters),
        combination=form.combination(adapters),
        base=form.base(base_revision),
        base_revision=base_revision,
        allow=allow,
        placement=placement,
        tag=form.tag(event_tag),
        mode=mode,
        merged=form.model("merged-path"),
        dtype=cast(Literal["auto", "bfloat16", "float16", "float32"], form.choice("dtype")),
        rounding=read_rounding(form, mode=mode),
        device=cast(Literal["auto", "cuda", "cpu"], form.choice("device")),
        machine=read_machine(form),
        hf_token=hf_token,
        base_token=values.get("base-token") or hf_token,
        signing_key=form.signing_key("signing-key"),
        is_keyless=hf_token is None and placement.folder is None and has_identity(environ),
        private=form.boolean("private"),
        work_dir=form.folder("work-dir"),
        report_dir=form.folder("report-dir") or form.workspace.root,
        cache_dir=form.folder("cache-dir"),
        verify_prompts=form.prompts("verify-prompts"),
        limits=read_limits(form, mode=mode),
        evaluation=read_evaluation(form, mode=mode),
        commit_message=values.get("commit-message") or None,
        on_existing_tag=cast(Literal["fail", "skip", "replace"], form.choice("on-existing-tag")),
        workspace=form.workspace,
    )
    _check_combinations(form, inputs, event_problems)
    if form.problems:
        raise InputError(form.problems)
    return inputs


def _check_combinations(form: Form, inputs: Inputs, event_problems: Sequence[Problem]) -> None:
    form.require(
        "adapter-path",
        why="There is nothing to merge without an adapter.",
        fix="Set it to the adapter's folder, or to `owner/name` or `owner/name@revision` on the Hub.",
    )
    if inputs.mode == "verify":
        form.require(
            "merged-path",
            why="`mode: verify` judges a merge that exists already.",
            fix="Set it to the merged model's folder, or to `owner/name@revision` on the Hub.",
        )
    elif inputs.merged is not None:
        form.add(
            f"`merged-path` is given, but `mode` is `{inputs.mode}`.",
            why="Only `mode: verify` reads an existing merge; the others would ignore it.",
            fix="Set `mode: verify`, or remove `merged-path`.",
        )
    if "not-verified" in inputs.allow and inputs.mode != "publish":
        form.add(
            f"`allow` names `not-verified`, but `mode` is `{inputs.mode}`.",
            why="Nothing is published in this mode, so it would be ignored.",
            fix="Remove it, or set `mode: publish`.",
        )
    if inputs.mode == "publish":
        _check_publishing(form, inputs, event_problems)


def _check_publishing(form: Form, inputs: Inputs, event_problems: Sequence[Problem]) -> None:
    form.require(
        "target-repo",
        why="`mode: publish` must know where the release goes.",
        fix="Set it to `owner/name`, or set `mode: plan` to see what would happen.",
    )
    if inputs.placement.folder is None and not inputs.is_keyless:
        form.require(
            "hf-token",
            why="Nothing can be published without a token that may write to `target-repo`.",
            fix="Set `hf-token: ${{ secrets.HF_TOKEN }}`; outside a workflow set the variable `HF_TOKEN`. Without a "
            "secret, give the job `permissions: { id-token: write }` and make it a trusted publisher.",
        )
    if inputs.tag is None:
        form.require(
            "tag",
            why="A release needs a name, and this run was not started by a release or a pushed tag.",
            fix="Set it, for example `tag: v1.0.0`.",
        )
    form.problems.extend(event_problems)
    sources = [*(("adapter-path", ref) for ref in inputs.adapters), ("base-model", inputs.base)]
    if "same-repo" not in inputs.allow:
        check_sources(form, inputs.placement, sources)
    check_placement(form, inputs.placement, inputs.tag)


def has_identity(environ: Mapping[str, str]) -> bool:
    """Return whether the job may ask GitHub for an id token (`permissions: id-token: write`)."""
    return bool(environ.get(IDENTITY_URL) and environ.get(IDENTITY_TOKEN))
