"""One run of the action as a process: its inputs, how it ended, and the Hub that it ran against."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig

from tests.acceptance.warmth import ROOT, Warmth, warmed
from tests.hub.identity import IdentityProvider
from tests.hub.server import LocalHub
from tests.hub.state import Limits
from tests.hub.view import RepoView
from tests.parity import models

REPO = "alice/model"
TAG = "v1.0.0"
HUNG = 124
UPLOADS = frozenset({"lfs-put", "lfs-part", "xet-put"})
LIMITS = Limits(multipart_threshold_bytes=1_600_000, part_size_bytes=1 << 20)
# Settings that every user has; they make a failing run short.
SHORT = {
    "LORA_MERGE_HUB_TIMEOUT_S": "3",
    "LORA_MERGE_HUB_DEADLINE_S": "6",
    "LORA_MERGE_HUB_FIRST_WAIT_S": "0.05",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "20ms",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3",
    "HF_XET_CLIENT_READ_TIMEOUT": "3s",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run of the action ended.

    Attributes:
        code: of the process.
        log: what it printed.
        report: `report.json`; empty where none was written.
    """

    code: int
    log: str
    report: Mapping[str, Any]

    @property
    def told(self) -> str:
        """What the first problem says, its reason included; '' where there is none."""
        problems = self.report.get("problems") or []
        return f"{problems[0]['what']} {problems[0]['why']}" if problems else ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A base of 3.5 MB in two shards, an adapter, and warm workers: what all runs share."""

    base: Path
    adapter: Path
    warmth: Warmth

    def command(self, folder: Path, *flags: str) -> list[str]:
        """Return the action's command line; the report goes to `folder`."""
        return [
            sys.executable, str(ROOT / "entrypoint.py"), "--adapter-path", str(self.adapter),
            "--base-model", str(self.base), "--target-repo", REPO, "--tag", TAG, "--device", "cpu",
            "--report-dir", str(folder / "report"), *flags,
        ]  # fmt: skip

    def environ(self, hub: LocalHub, token: str, folder: Path, *, xet: bool) -> dict[str, str]:
        """Return the environment of a run on a machine that knows nothing of earlier ones."""
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "INPUT_", "GITHUB_"))}
        return kept | hub.env(token, home=folder / "home", xet=xet) | SHORT | self.warmth.environ

    def run(
        self, hub: LocalHub, token: str, folder: Path, *flags: str, xet: bool, environ: Mapping[str, str] | None = None
    ) -> Ended:
        """Run the action in `folder`, which is made."""
        folder.mkdir()
        try:
            done = subprocess.run(
                self.command(folder, *flags), cwd=folder, capture_output=True, text=True, timeout=180, check=False,
                env=self.environ(hub, token, folder, xet=xet) | dict(environ or {}),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:  # it was killed
            return Ended(code=HUNG, log=f"it hung: {error.output!r}", report={})
        return Ended(code=done.returncode, log=done.stdout + done.stderr, report=read_report(folder))


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a run in `folder`."""
    path = folder / "report" / "report.json"
    return json.loads(path.read_text()) if path.exists() else {}


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """Yield what runs share, made in `folder`."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = models.save_base(transformers.LlamaForCausalLM(config), folder / "base", dtype=torch.bfloat16, shard="2MB")
    (base / "LICENSE").write_text("As is.\n")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapter = models.save_adapter(base, folder / "adapter", lora)
    (adapter / "README.md").unlink()
    with warmed(folder) as warmth:
        yield Stage(base=base, adapter=adapter, warmth=warmth)


@contextmanager
def a_hub(folder: Path, *, existing: bool = False) -> Iterator[tuple[LocalHub, str]]:
    """Yield a Hub of its own and a token of alice.

    Args:
        folder: where it keeps everything.
        existing: whether the target is there already, with a file that no release has brought.
    """
    with LocalHub.start(folder, limits=LIMITS) as hub:
        hub.add_user("alice")
        if existing:
            (folder / "seed").mkdir()
            (folder / "seed" / "notes.md").write_text("Mine.\n")
            hub.add_model(REPO, folder / "seed")
        yield hub, hub.add_token("alice")


def commits(hub: LocalHub) -> int:
    """Return how many commits the target has."""
    repo = hub.repo(REPO)
    return 0 if repo is None else len(repo.commits)


def tags(hub: LocalHub) -> dict[str, str]:
    """Return the tags of the target."""
    repo = hub.repo(REPO)
    return {} if repo is None else repo.tags


def accepted_bytes(hub: LocalHub) -> int:
    """Return how many bytes of large files the Hub has taken and confirmed since its log was emptied."""
    taken = (one for one in hub.exchanges() if one.endpoint in UPLOADS and one.status == 200)
    return sum(one.received_bytes for one in taken)


def large_bytes(hub: LocalHub, revision: str = TAG) -> int:
    """Return the size of what a release has as large files: weights and pictures."""
    repo = hub.repo(REPO)
    assert repo is not None
    is_large = {path: len(digest) == 64 for path, digest in repo.tree(revision).items()}
    return sum(len(repo.read(path, revision)) for path in is_large if is_large[path])


@contextmanager
def identity(hub: LocalHub, *, wanted: bool) -> Iterator[dict[str, str]]:
    """Yield what a job has in its environment that may publish to the target without a token; nothing if not wanted."""
    if not wanted:
        yield {}
        return
    with IdentityProvider.start("acme/training") as provider:
        hub.trust(REPO, provider.issuer, repository="acme/training", workflow="publish.yml")
        github = {"GITHUB_EVENT_NAME": "workflow_dispatch", "HF_TOKEN": ""}
        yield provider.env() | github


def wrong_in_release(
    hub: LocalHub, merged_digest: str, aliases: Sequence[str] = (), *, staged: bool = False
) -> list[str]:
    """Return what is wrong with the release under the tag, read past the protocol; nothing for a right one.

    Args:
        hub: the Hub.
        merged_digest: of the merge, from a run without faults.
        aliases: tags that must be on the same commit.
        staged: whether main has a commit of its own.
    """
    repo = hub.repo(REPO)
    if repo is None or TAG not in repo.tags:
        return [f"there is no tag {TAG}"]
    found = _wrong_refs(repo, {TAG, *aliases}, staged=staged)
    tree = repo.tree(TAG)
    manifest = json.loads(repo.read("merge-manifest.json", TAG))
    if manifest["merged_digest"] != merged_digest:
        found.append("the manifest names another merge")
    lines = [f"{file['sha256']}  {file['path']}\n" for file in sorted(manifest["files"], key=_path)]
    for file in manifest["files"]:
        if file["path"] not in tree:
            found.append(f"{file['path']} is missing")
        elif hashlib.sha256(repo.read(file["path"], TAG)).hexdigest() != file["sha256"]:
            found.append(f"{file['path']} is other content")
    if not any(line.endswith(".safetensors\n") for line in lines):
        found.append("there are no weights")
    return found


def _wrong_refs(repo: RepoView, wanted: set[str], *, staged: bool) -> list[str]:
    rules = (
        (set(repo.tags) == wanted, f"the tags are {sorted(repo.tags)}"),
        (len(set(repo.tags.values())) == 1, "the tags are on several commits"),
        (set(repo.branches) == {"main"}, f"the branches are {sorted(repo.branches)}"),
        (staged or repo.tags[TAG] == repo.branches["main"], "the tag is not on the head of main"),
        (repo.tree("main") == repo.tree(TAG), "main holds other files than the tag"),
    )
    return [text for is_so, text in rules if not is_so]


def _path(file: Mapping[str, str]) -> str:
    return file["path"]


def problems_of(ended: Ended, secrets: Sequence[str]) -> list[str]:
    """Return how the telling of a run falls short: of a refusal without its parts, a traceback, or a secret shown."""
    found = []
    if ended.code not in (0, 3, 9):
        found.append(f"the exit code is {ended.code}: {ended.log[-1500:]}")
    if "Traceback" in ended.log:
        found.append("the log holds a traceback")
    for problem in ended.report.get("problems", ()):
        found += [f"the problem has no {part}" for part in ("what", "why", "fix") if not problem[part]]
    if ended.code and not ended.report.get("problems"):
        found.append("no problem is told")
    shown = ended.log + json.dumps(ended.report)
    found += ["a secret is shown" for secret in secrets if secret in shown]
    return found
