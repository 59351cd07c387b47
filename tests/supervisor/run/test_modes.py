"""The three modes on a tiny model: publish, verify, plan; what each writes, and what it must not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file

from runner.supervisor.launch.cgroup import read_memory
from tests.acceptance.warmth import Warmth
from tests.hub.server import LocalHub
from tests.supervisor.run.conftest import ROOT, Action


@pytest.fixture
def action(hub: LocalHub, warmth: Warmth, tmp_path: Path) -> Action:
    """Each test has an account of its own, so that releases do not meet."""
    name = f"user{time.monotonic_ns()}"
    hub.add_user(name)
    return Action(hub=hub, token=hub.add_token(name, role="write"), folder=tmp_path, warmth=warmth)


def _target(action: Action) -> str:
    who = HfApi(endpoint=action.hub.endpoint, token=action.token).whoami()
    return f"{who['name']}/merged"


def _flags(base: Path, adapter: Path, target: str) -> tuple[str, ...]:
    return (
        "--adapter-path", str(adapter), "--base-model", str(base), "--target-repo", target, "--tag", "v1.0.0",
    )  # fmt: skip


def test_publishes_one_commit_and_one_tag_and_finds_them_again(action: Action, base: Path, adapter: Path) -> None:
    target = _target(action)

    first = action.run(*_flags(base, adapter, target))
    told = (action.folder / "report" / "report.md").read_text()
    again = action.run(*_flags(base, adapter, target))

    assert first.code == 0, first.log
    assert first.outputs["verified"] == "true"
    repo = action.hub.repo(target)
    assert repo is not None
    assert repo.private
    assert repo.tags == {"v1.0.0": first.outputs["commit-sha"]}
    assert again.code == 0, again.log
    assert again.outputs["commit-sha"] == first.outputs["commit-sha"]
    assert len(action.hub.repo(target).commits) == len(repo.commits) == 2  # type: ignore[union-attr]
    manifest = json.loads(repo.read("merge-manifest.json", "v1.0.0"))
    assert manifest["merged_digest"] == first.outputs["merged-digest"]
    assert manifest["adapter"]["digest"] == first.outputs["adapter-digest"]
    pictures = {path for path in repo.tree("v1.0.0") if path.startswith("merge-report/")}
    assert "merge-report/retention.png" in pictures
    card = repo.read("README.md", "v1.0.0").decode()
    assert all(path in card for path in pictures if path.endswith(".png"))
    assert {f"merge-report/{path.name}" for path in (action.folder / "report").glob("*.[ps][nv]g")} == pictures
    assert "](retention.png)" in told
    assert set(repo.tree("v1.0.0")) >= {"README.md", "config.json", "model.safetensors.index.json"}


def test_other_content_under_the_same_tag_is_an_error_and_changes_nothing(
    action: Action, base: Path, adapter: Path, tmp_path: Path
) -> None:
    target = _target(action)
    action.run(*_flags(base, adapter, target))
    before = action.hub.repo(target)
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text()) | {"lora_alpha": 16}
    (other / "adapter_config.json").write_text(json.dumps(config))

    result = action.run(*_flags(base, other, target))

    after = action.hub.repo(target)
    assert result.code == 3, result.log
    assert "v1.0.0" in result.log
    assert before is not None
    assert after is not None
    assert (after.tags, after.commits) == (before.tags, before.commits)


def test_plan_of_a_base_on_the_hub_downloads_no_weights(
    action: Action, base: Path, adapter: Path, tmp_path: Path
) -> None:
    target = _target(action)
    base_id = target.replace("/merged", "/base")
    action.hub.add_model(base_id, base)
    cache = tmp_path / "cache"

    result = action.run(
        "--adapter-path", str(adapter), "--base-model", base_id, "--mode", "plan", "--cache-dir", str(cache)
    )

    assert result.code == 0, result.log
    assert result.report["plan"]["tensors_merged"] == 4
    assert result.outputs["base-revision"] == action.hub.repo(base_id).branches["main"]  # type: ignore[union-attr]
    assert result.outputs["verified"] == "skipped"
    on_disk = sum(path.stat().st_blocks * 512 for path in cache.rglob("*.safetensors") if not path.is_symlink())
    assert on_disk < sum(path.stat().st_size for path in base.glob("*.safetensors"))
    local = action.run("--adapter-path", str(adapter), "--base-model", str(base), "--mode", "plan")
    notes = [found.report["plan"].pop("notes") for found in (local, result)]
    assert local.report["plan"] == result.report["plan"]
    assert [len(note) for note in notes] == [1, 1]  # each names the base that was meant, and where it is merged into


def test_a_base_on_the_hub_is_merged_as_the_local_one(action: Action, base: Path, adapter: Path) -> None:
    target = _target(action)
    base_id = target.replace("/merged", "/base")
    action.hub.add_model(base_id, base)

    remote = action.run(
        "--adapter-path", str(adapter), "--base-model", base_id, "--target-repo", target, "--tag", "v1.0.0"
    )
    local = action.run(*_flags(base, adapter, target.replace("merged", "local")))

    assert remote.code == local.code == 0, remote.log
    assert remote.outputs["merged-digest"] == local.outputs["merged-digest"]


def _released(action: Action, target: str, folder: Path) -> Path:
    repo = action.hub.repo(target)
    assert repo is not None
    folder.mkdir()
    for path in repo.tree("v1.0.0"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(repo.read(path, "v1.0.0"))
    return folder


def test_verify_judges_a_folder_and_a_damaged_copy(action: Action, base: Path, adapter: Path, tmp_path: Path) -> None:
    target = _target(action)
    action.run(*_flags(base, adapter, target))
    merged = _released(action, target, tmp_path / "merged")
    flags = ("--mode", "verify", "--adapter-path", str(adapter), "--base-model", str(base), "--merged-path")

    good = action.run(*flags, str(merged))
    by_name = action.run(*flags, f"{target}@v1.0.0")
    _flip_one_bit(merged)
    bad = action.run(*flags, str(merged))

    assert good.code == 0, good.log
    assert by_name.code == 0, by_name.log
    assert good.outputs["verified"] == by_name.outputs["verified"] == "true"
    assert bad.code == 8, bad.log
    assert bad.outputs["verified"] == "false"
    assert bad.outputs["status"] == "FAIL"
    assert "q_proj" in bad.log


def _flip_one_bit(merged: Path) -> None:
    path = next(path for path in merged.glob("*.safetensors") if "q_proj" in str(list(load_file(path))))
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if "q_proj" in name)
    content[8 + length + header[name]["data_offsets"][0] + 4] ^= 0b100
    path.write_bytes(content)


def test_the_worker_sees_no_token_and_no_address(action: Action, base: Path, adapter: Path) -> None:
    seen: set[str] = set()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), *_flags(base, adapter, _target(action))],
        cwd=action.folder, env=os.environ | action.hub.env(action.token) | {"ACTIONS_RUNTIME_TOKEN": "runtime"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        seen |= {text for pid in _children(process.pid) for text in _open_to_read(pid)}
        time.sleep(0.01)

    workers = [text for text in seen if "runner.worker.main" in text]
    assert process.returncode == 0
    assert workers
    for text in seen:
        assert action.token not in text
        assert "ACTIONS_RUNTIME_TOKEN" not in text
        assert "HF_ENDPOINT" not in text


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _open_to_read(pid: int) -> list[str]:
    try:  # between fork and exec a child still has its parent's environment; only the worker's own counts
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        return [arguments + Path(f"/proc/{pid}/environ").read_bytes().decode()] if "worker" in arguments else []
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cancelling_ends_the_worker_and_publishes_nothing(
    number: signal.Signals, action: Action, base: Path, adapter: Path, tmp_path: Path
) -> None:
    target = _target(action)
    process = subprocess.Popen(
        [
            sys.executable, str(ROOT / "entrypoint.py"), "--report-dir", str(tmp_path / "r"),
            *_flags(base, adapter, target),
        ],
        cwd=tmp_path, env=os.environ | action.hub.env(action.token), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    workers: list[int] = []
    while not workers:
        workers = _children(process.pid)
        assert process.poll() is None
        time.sleep(0.01)

    process.send_signal(number)
    log, _ = process.communicate(timeout=30)

    assert process.returncode == 130, log
    assert "cancelled" in log
    gone_by = time.monotonic() + 4  # it was killed, and may still be on its way out
    while Path(f"/proc/{workers[0]}").exists():
        assert time.monotonic() < gone_by
        time.sleep(0.01)
    assert action.hub.repo(target) is None
    assert "cancelled" in json.loads((tmp_path / "r" / "report.json").read_text())["problems"][0]["what"]


def test_a_worker_that_is_killed_is_told_with_its_signal(action: Action, base: Path, adapter: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), *_flags(base, adapter, _target(action))],
        cwd=action.folder, env=os.environ | action.hub.env(action.token), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    workers: list[int] = []
    while not workers:
        workers = _children(process.pid)
        time.sleep(0.01)

    os.kill(workers[0], signal.SIGKILL)
    log, _ = process.communicate(timeout=60)

    # The kernel counts what it kills for lack of memory; where that can be read, this was not it.
    assert process.returncode == (6 if read_memory() is None else 7), log
    assert "SIGKILL" in log


def test_the_worker_ends_with_its_supervisor_even_when_that_is_killed(
    action: Action, base: Path, adapter: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), *_flags(base, adapter, _target(action))],
        cwd=action.folder, env=os.environ | action.hub.env(action.token), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Plan"):
            break
    (worker,) = _children(process.pid)

    process.kill()
    process.wait()

    deadline = time.monotonic() + 10
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
