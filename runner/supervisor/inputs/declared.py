"""Every input of the action: its name, what it is for, what it takes. `action.yml` says the same, and tests compare."""

from __future__ import annotations

from dataclasses import dataclass

from runner.protocol.allow import forms
from runner.protocol.combination import KINDS, MAJORITIES
from runner.protocol.rounding import KINDS as ROUNDINGS
from runner.protocol.rounding import NEAREST


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One input, as `action.yml` declares it.

    Attributes:
        name: in kebab-case; `--name` as a flag, `INPUT_NAME` as a variable (hyphens stay).
        description: one line for `--help`.
        default: used where nothing is given; "" for none.
        required: whether the run cannot do without it in any mode.
        secret: whether its value must never be shown, nor given as a flag.
        choices: all values it takes; () for free text.
        multiline: whether line breaks are part of the value.
        fallback: another variable that is read where this input is empty; "" for none.
    """

    name: str
    description: str
    default: str = ""
    required: bool = False
    secret: bool = False
    choices: tuple[str, ...] = ()
    multiline: bool = False
    fallback: str = ""

    @property
    def variable(self) -> str:
        """The environment variable that GitHub's runner sets for this input."""
        return f"INPUT_{self.name.upper()}"

    @property
    def variables(self) -> tuple[str, ...]:
        """All environment variables that may hold the value, the first one first."""
        return (self.variable, self.fallback) if self.fallback else (self.variable,)


INPUTS: tuple[InputSpec, ...] = (
    InputSpec(
        name="adapter-path",
        description="Adapter to merge: a local folder, or owner/name[@revision] on the Hub; or several, one a line, "
        "each with its weight behind it.",
        required=True,
        multiline=True,
    ),
    InputSpec(name="combination", description="How several adapters become one.", choices=KINDS),
    InputSpec(name="combination-density", description="Share of each adapter's values to keep, in (0, 1]."),
    InputSpec(name="combination-seed", description="Seed of dare's random choice; else 0."),
    InputSpec(name="combination-majority-sign", description="How ties elects a sign; else total.", choices=MAJORITIES),
    InputSpec(
        name="target-repo",
        description="Repository to publish to, owner/name, created if absent; or a folder, dir:///path.",
    ),
    InputSpec(
        name="target-revision",
        description="Branch that the release's commit goes to; started at main if absent.",
        default="main",
    ),
    InputSpec(
        name="base-model", description="Base model: a local folder, or owner/name[@revision]; else the adapter's."
    ),
    InputSpec(name="base-revision", description="Revision of the base model: a commit, tag or branch."),
    InputSpec(
        name="allow",
        description=f"What is refused unless it is allowed by name; one a line, or with commas: {', '.join(forms())}.",
        multiline=True,
    ),
    InputSpec(name="tag", description="Tag of the release; else the event's release or pushed tag."),
    InputSpec(
        name="also-tags",
        description="Tags that are moved to the release, such as latest; one a line, or with commas.",
        multiline=True,
    ),
    InputSpec(
        name="mode",
        description="What to do: release, judge an existing merge, or only say what would happen.",
        default="publish",
        choices=("publish", "verify", "plan"),
    ),
    InputSpec(
        name="merged-path", description="For mode verify: the merged model to judge, a folder or owner/name[@revision]."
    ),
    InputSpec(
        name="dtype",
        description="Type of the merged weights; auto keeps the base's.",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
    ),
    InputSpec(
        name="rounding",
        description="How merged values are rounded to 16 bits; stochastic keeps weak adapters, on average.",
        default=NEAREST,
        choices=ROUNDINGS,
    ),
    InputSpec(name="rounding-seed", description="Seed of stochastic rounding; else 0."),
    InputSpec(
        name="device",
        description="Where the judge runs the models; cuda never falls back to the CPU.",
        default="auto",
        choices=("auto", "cuda", "cpu"),
    ),
    InputSpec(
        name="executor",
        description="Where the worker runs: in this container, or in a sibling with a GPU; auto chooses, and says why.",
        default="auto",
        choices=("auto", "inline", "docker"),
    ),
    InputSpec(
        name="gpus", description="GPUs of the worker: all, none, how many, or which (device=0,2).", default="all"
    ),
    InputSpec(name="min-free-vram", description="Memory that must be free on a GPU before it is used, such as 20GB."),
    InputSpec(name="gpu-wait-timeout", description="Minutes to wait for a free GPU.", default="30"),
    InputSpec(
        name="hf-token",
        description="Token that may write to target-repo (and read adapter and base); else a trusted publisher's.",
        secret=True,
        fallback="HF_TOKEN",
    ),
    InputSpec(
        name="base-token", description="Token that may read base and adapter, if it is another one.", secret=True
    ),
    InputSpec(
        name="signing-key",
        description="Private key (ECDSA, PEM) that signs the release; else it is not signed.",
        secret=True,
        multiline=True,
    ),
    InputSpec(name="private", description="Whether a repository that is created is private.", default="true"),
    InputSpec(
        name="work-dir", description="Folder for the merged files, where a killed run resumes; else a temporary one."
    ),
    InputSpec(
        name="report-dir",
        description="Folder for report.json, report.md and its pictures.",
        default="lora-merge-report",
    ),
    InputSpec(name="cache-dir", description="Folder that keeps downloads between runs; else none are kept."),
    InputSpec(
        name="phase-timeout-minutes", description="Minutes that one phase may take; 0 for any number.", default="330"
    ),
    InputSpec(
        name="verify-prompts",
        description="Prompts to verify with beside the built-in ones: one a line, or a .txt or .jsonl file.",
        multiline=True,
    ),
    InputSpec(
        name="verify-tolerance",
        description="Limits of the judgement to loosen, such as end-to-end=1e-3; told in report and card.",
        multiline=True,
    ),
    InputSpec(
        name="quality-limits",
        description="Limits on what rounding may cost, such as retention>=0.9 kl-mean-nats<=0.01; else none.",
        multiline=True,
    ),
    InputSpec(
        name="eval-text",
        description="Text file whose perplexity is measured for base, unmerged and merged model.",
    ),
    InputSpec(name="commit-message", description="Message of the commit on the Hub.", multiline=True),
    InputSpec(
        name="on-existing-tag",
        description="What to do if the tag exists with other content.",
        default="fail",
        choices=("fail", "skip", "replace"),
    ),
    InputSpec(
        name="protected-tags",
        description="Patterns of tags that are never moved, such as v*; one a line, or with commas.",
        multiline=True,
    ),
    InputSpec(
        name="staging", description="Whether the branch follows only after the tag was read back.", default="false"
    ),
    InputSpec(
        name="create-pr", description="Whether to open a pull request instead of a tagged commit.", default="false"
    ),
    InputSpec(
        name="archive-adapter", description="Whether the release holds the adapter, under adapter/.", default="false"
    ),
    InputSpec(name="hub-endpoint", description="Address of the Hub; else the public one.", fallback="HF_ENDPOINT"),
)
