"""What the tests of publishing share: a release to publish, and short waits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from runner.protocol.digests import digest_folder
from runner.protocol.verdict import Check, Layer, Outcome, Status, Verdict
from runner.supervisor.documents import provenance
from runner.supervisor.documents.provenance import MergeFacts, Origin, manifest
from runner.supervisor.hub import Hub, Patience, connect
from runner.supervisor.publish import OnExistingTag, Release, Wanted, find_existing, finish, publish
from tests.hub.server import LocalHub

REPO = "alice/model"
PATIENCE = Patience(attempts=4, deadline_s=20.0, first_wait_s=0.01, longest_wait_s=0.05)
CARD = b"---\nlicense: apache-2.0\n---\n# A merged model\n"
FACTS = MergeFacts(
    peft_type="LORA",
    output_dtype="BF16",
    tensors_merged=2,
    tensors_added=0,
    tensors_copied=3,
    tensors_cast=0,
    versions={"torch": "2.13.0"},
)


def origin(adapter: str = "a" * 64) -> Origin:
    return Origin(
        base_repo_id="acme/base",
        base_commit="1" * 40,
        base_digest=None,
        adapter_repo_id="alice/adapter",
        adapter_commit="2" * 40,
        adapter_digest=adapter,
        dtype="auto",
        version="0.1.0",
    )


def verdict(status: Status = Status.PASS, value: float = 1e-7) -> Verdict:
    check = Check(layer=Layer.SEMANTICS, name="probes agree", outcome=Outcome.PASS, value=value, limit=1e-6)
    return Verdict(status=status, checks=(check,), modules=(), quality=None, continuations=(), seed=0, wall_s=1.5)


def make_folder(root: Path, *, shards: int = 2, seed: int = 0) -> Path:
    root.mkdir(parents=True)
    rng = random.Random(seed)
    for number in range(1, shards + 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        (root / name).write_bytes(rng.randbytes(1_300_000 * number))  # the second one is sent in parts
    (root / "model.safetensors.index.json").write_text(f'{{"weight_map": {{}}, "shards": {shards}}}')
    (root / "config.json").write_text('{"model_type": "llama"}')
    (root / "LICENSE").write_text("as is")
    (root / "additional_chat_templates").mkdir()
    (root / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    return root


@dataclass(kw_only=True)
class World:
    """One publisher."""

    hub: LocalHub
    token: str | None
    folder: Path
    patience: Patience
    origin: Origin = field(default_factory=origin)
    timeout_s: float = 20.0

    def connect(self) -> Hub:
        return connect(self.hub.endpoint, token=self.token, timeout_s=self.timeout_s, patience=self.patience)

    def publish(
        self,
        *,
        repo_id: str = REPO,
        tag: str = "v1.0.0",
        on_existing_tag: OnExistingTag = "fail",
        judged: Verdict | None = None,
        card: bytes = CARD,
        pictures: Mapping[str, bytes] | None = None,
        signed_by: str | None = None,
        before: Callable[[], Any] | None = None,
        **more: Any,
    ) -> Release:
        """Do what the supervisor does: preflight, look for the release, (`before`), publish."""
        hub = self.connect()
        names = {field.name for field in fields(Wanted)}
        wishes = {name: more.pop(name) for name in names & more.keys()}
        wanted = Wanted(tag=tag, on_existing_tag=on_existing_tag, **wishes)
        target = hub.inspect_target(repo_id, tag, wanted.wishes)
        found = find_existing(hub, target, wanted, self.origin.input_digest())
        if found is not None:
            finish(hub, found, wanted, more.get("log", print))
            return found
        if before is not None:
            before()
        files = digest_folder(self.folder)
        judged = judged or verdict()
        return publish(
            hub,
            target=target,
            folder=self.folder,
            files=files,
            documents={
                provenance.CARD: card,
                provenance.MANIFEST: manifest(
                    self.origin,
                    FACTS,
                    judged,
                    files,
                    signed_by=signed_by,
                    archived=[kept.file for kept in more.get("archived", ())],
                ),
                **(pictures or {}),
            },
            wanted=wanted,
            verdict=judged,
            input_digest=self.origin.input_digest(),
            **more,
        )

    def commits(self, repo_id: str = REPO) -> int:
        """Commits beyond the one that a new repository has."""
        repo = self.hub.repo(repo_id)
        return 0 if repo is None else len(repo.commits) - 1

    def tags(self, repo_id: str = REPO) -> dict[str, str]:
        repo = self.hub.repo(repo_id)
        return {} if repo is None else repo.tags

    def paths(self, revision: str = "main", repo_id: str = REPO) -> set[str]:
        repo = self.hub.repo(repo_id)
        assert repo is not None
        return set(repo.tree(revision))

    def sent(self, method: str, part: str) -> int:
        """How many requests of this method had `part` in their path."""
        return sum(1 for verb, path in self.hub.requests() if verb == method and part in path)

    def calls(self, endpoint: str) -> int:
        """How many requests an endpoint got."""
        return sum(exchange.endpoint == endpoint for exchange in self.hub.exchanges())
