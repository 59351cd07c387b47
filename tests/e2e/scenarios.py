"""What a run must do, wherever it runs: each scenario is played by a process and by a container."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tests.contract.runner_emulator import Event, Runner, RunResult
from tests.hub.server import LocalHub

REPO = "alice/merged"
HOSTILE = "::error::not a command\n##[error]neither\n::add-mask::model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A workflow of alice's: its runner, its Hub, how the step is run, and variables that it gets besides."""

    runner: Runner
    hub: LocalHub
    token: str
    executor: Literal["process", "docker"]
    image: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)

    def run(
        self, event: Event, *, cancel_when: str | None = None, kill_when: str | None = None, **inputs: str
    ) -> RunResult:
        """Run the step; underscores in the names of inputs stand for hyphens."""
        given = {
            "adapter-path": "adapter",
            "base-model": "base",
            "target-repo": REPO,
            "device": "cpu",
            "hf-token": self.token,
            **{name.replace("_", "-"): value for name, value in inputs.items()},
        }
        return self.runner.run(
            given,
            event,
            executor=self.executor,
            image=self.image,
            env=self.hub.env() | dict(self.environ),
            cancel_when=cancel_when,
            kill_when=kill_when,
        )

    def post(self, step: RunResult) -> RunResult:
        """Run the action's post step after `step`."""
        return self.runner.run(
            {"adapter-path": "adapter"}, Event.dispatch(), executor=self.executor, image=self.image, post_of=step
        )


def publishes_a_verified_release_once(stage: Stage) -> None:
    event = Event.release("v1.0.0", body=HOSTILE, name=HOSTILE)

    first = stage.run(event, commit_message=HOSTILE, verify_prompts="Hello, who are you?\n::error::x")

    assert first.exit_code == 0, first.log
    assert first.annotations_of("error") == []
    repo = stage.hub.repo(REPO)
    assert repo is not None
    assert repo.private
    assert repo.tags == {"v1.0.0": first.outputs["commit-sha"]}
    assert (first.outputs["tag"], first.outputs["verified"], first.outputs["status"]) == ("v1.0.0", "true", "PASS")
    assert first.outputs["repo-url"].startswith(stage.hub.endpoint)
    assert first.outputs["storage-violations"] == "0"
    assert float(first.outputs["max-probe-error"]) <= 1e-6
    assert float(first.outputs["end-to-end-error"]) <= 1e-4
    _check_published_files(stage, first)
    _check_report(stage, first)

    requests = len(repo.commits)
    again = stage.run(event, commit_message="another", verify_prompts="Hello, who are you?\n::error::x")

    assert again.exit_code == 0, again.log
    assert again.outputs["commit-sha"] == first.outputs["commit-sha"]
    repo = stage.hub.repo(REPO)
    assert repo is not None
    assert len(repo.commits) == requests


def _check_published_files(stage: Stage, result: RunResult) -> None:
    repo = stage.hub.repo(REPO)
    assert repo is not None
    manifest = json.loads(repo.read("merge-manifest.json", "v1.0.0"))
    listed = {file["path"]: file["sha256"] for file in manifest["files"]}
    assert any(path.endswith(".safetensors") for path in listed)
    for path, sha256 in listed.items():
        assert hashlib.sha256(repo.read(path, "v1.0.0")).hexdigest() == sha256, path
    assert repo.read("README.md", "v1.0.0").startswith(b"---\n")
    lines = "".join(f"{listed[path]}  {path}\n" for path in sorted(listed))
    assert hashlib.sha256(lines.encode()).hexdigest() == result.outputs["merged-digest"]


def _check_report(stage: Stage, result: RunResult) -> None:
    path = stage.runner.workspace / result.outputs["report-path"]
    report = json.loads(path.read_text())
    assert report["outputs"] == result.outputs
    assert report["verdict"]["status"] == "PASS"
    assert report["inputs"]["tag"] == "v1.0.0"
    assert stage.token not in path.read_text()
    assert _without_pictures(result.summary) == _without_pictures(path.with_name("report.md").read_text())
    assert "Verified" in result.summary
    owner = stage.runner.workspace.stat()
    for written in (path, path.parent, path.with_name("report.md")):
        assert (written.stat().st_uid, written.stat().st_gid) == (owner.st_uid, owner.st_gid)


def _without_pictures(markdown: str) -> str:
    """Return a report without the part in which file and summary differ: a summary can show no picture of a folder."""
    found = re.subn(
        r"<details><summary>Pictures.*?</details>\n|### Pictures\n.*?(?=^(?:###|<details>))",
        "",
        markdown,
        flags=re.DOTALL | re.MULTILINE,
    )
    assert found[1] == 1
    return re.sub(r"\n+", "\n", found[0].strip())


def tells_every_bad_input_and_asks_nobody(stage: Stage) -> None:
    stage.hub.forget_requests()

    result = stage.run(Event.dispatch(), adapter_path="missing", dtype="bf16", target_repo="nope", private="maybe")

    assert result.exit_code == 2
    titles = [annotation.title for annotation in result.annotations_of("error")]
    for text in ("`adapter-path`", "`dtype`", "`target-repo`", "`private`", "`tag`"):
        assert any(text in title for title in titles), text
    assert "### Problems" in result.summary
    assert (result.outputs["verified"], result.outputs["commit-sha"]) == ("skipped", "")
    assert stage.hub.requests() == []


def refuses_to_publish_for_a_pull_request(stage: Stage) -> None:
    stage.hub.forget_requests()

    result = stage.run(Event.pull_request(), tag="v1")

    assert result.exit_code == 2
    assert "'pull_request'" in result.annotations_of("error")[0].title
    assert stage.hub.requests() == []


def plans_without_a_token(stage: Stage) -> None:
    result = stage.run(Event.pull_request(), mode="plan", hf_token="", target_repo="")

    assert result.exit_code == 0, result.log
    assert "### Plan" in result.summary
    assert (result.outputs["verified"], result.outputs["status"]) == ("skipped", "NOT_VERIFIED")
    assert stage.hub.repo(REPO) is None


def fails_a_merge_that_was_never_applied(stage: Stage) -> None:
    result = stage.run(Event.dispatch(), mode="verify", merged_path="base", hf_token="", target_repo="")

    assert result.exit_code == 8, result.log
    assert (result.outputs["verified"], result.outputs["status"]) == ("false", "FAIL")
    assert int(result.outputs["storage-violations"]) > 0
    assert "Not verified" in result.summary
    assert stage.hub.repo(REPO) is None


def stops_when_it_is_cancelled(stage: Stage) -> None:
    result = stage.run(Event.release("v1.0.0"), cancel_when="Download")

    assert result.exit_code == 130, result.log
    assert "cancelled" in result.annotations_of("error")[0].title
    assert stage.hub.repo(REPO) is None
    assert list(stage.runner.temp.glob("lora-merge-*")) == []
