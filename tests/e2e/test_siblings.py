"""The worker in a sibling container, on an engine that gives GPUs (a stand-in of the toolkit) and on one without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.runner_emulator import Event, Runner
from tests.e2e.scenarios import REPO, Stage
from tests.e2e.second_engine import SecondEngine, load_image, second_engine
from tests.hub.server import LocalHub

pytestmark = [pytest.mark.docker, pytest.mark.slow]
WORKERS = "label=lora-merge.supervisor"
OWNER = 1000


@pytest.fixture(scope="module")
def gpu_engine(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecondEngine]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("dockerd", "ip"))):
        pytest.skip("a second engine needs dockerd, ip and root")
    # A socket's path may have 107 characters, and overlay2 cannot be on another overlay.
    with second_engine(tmp_path_factory.mktemp("e")) as engine:
        load_image(image, os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"), engine.host)
        yield engine


@pytest.fixture
def stage(image: str, runner: Runner, hub: LocalHub) -> Stage:
    give(runner.work, OWNER)
    return Stage(runner=runner, hub=hub, token=hub.add_token("alice", role="write"), executor="docker", image=image)


@pytest.fixture
def on_gpu_engine(gpu_engine: SecondEngine, monkeypatch: pytest.MonkeyPatch) -> SecondEngine:
    monkeypatch.setenv("DOCKER_HOST", gpu_engine.host)
    gpu_engine.forget()
    return gpu_engine


def give(folder: Path, owner: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, owner, owner)


def containers(*filters: str) -> list[str]:
    command = [
        "docker",
        "ps",
        "--all",
        "--quiet",
        "--no-trunc",
        *(part for one in filters for part in ("--filter", one)),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def value_of(environment: list[str], name: str) -> str:
    """Return a variable as the toolkit reads it: the last one counts."""
    return [entry.partition("=")[2] for entry in environment if entry.partition("=")[0] == name][-1]


def test_a_release_is_made_by_a_sibling_with_two_gpus(stage: Stage, on_gpu_engine: SecondEngine) -> None:
    stage.hub.add_model("alice/base", stage.runner.workspace / "base")
    shutil.rmtree(stage.runner.workspace / "base")
    before = set(stage.runner.workspace.iterdir())

    result = stage.run(
        Event.release("v1.0.0"), base_model="alice/base", device="auto", gpus="0,2", work_dir="scratch/work",
        cache_dir="scratch/cache",
    )  # fmt: skip

    assert result.exit_code == 0, result.log
    assert result.outputs["status"] == "PASS"
    assert "Executor: docker (a GPU is wanted, and none is visible here), GPUs device=0,2." in result.log
    assert "CPU (the torch in this image is built without CUDA)" in result.log
    repo = stage.hub.repo(REPO)
    assert repo is not None
    assert set(repo.tags) == {"v1.0.0"}
    assert containers(WORKERS) == []
    (asked,) = on_gpu_engine.configurations()
    assert value_of(asked["process"]["env"], "NVIDIA_VISIBLE_DEVICES") == "0,2"
    check_that_it_can_do_nothing_else(asked, stage)
    made = set(stage.runner.workspace.iterdir()) - before
    assert {path.name for path in made} == {"lora-merge-report", "scratch"}
    strangers = [path for one in made for path in (one, *one.rglob("*")) if path.lstat().st_uid != OWNER]
    assert strangers == []


def check_that_it_can_do_nothing_else(asked: dict[str, Any], stage: Stage) -> None:
    process, linux = asked["process"], asked["linux"]
    text = json.dumps(asked)
    assert stage.token not in text
    assert not [mount for mount in asked["mounts"] if "docker.sock" in mount["source"] + mount["destination"]]
    assert not [entry for entry in process["env"] if entry.startswith(("ACTIONS_", "GITHUB_", "INPUT_", "HF_TOKEN"))]
    assert process["user"]["uid"] == OWNER
    assert process["noNewPrivileges"] is True
    assert not any(process["capabilities"].get(kind) for kind in ("bounding", "effective", "permitted"))
    assert asked["root"]["readonly"] is True
    assert {"type": "network"} in linux["namespaces"]  # its own, with nothing in it
    mounts = {mount["destination"]: mount for mount in asked["mounts"]}
    workspace = str(stage.runner.workspace)
    for inside, host, is_writable in (
        ("/github/workspace", workspace, False),
        ("/github/workspace/scratch/work/lora-merge-run", f"{workspace}/scratch/work/lora-merge-run", True),
        ("/github/workspace/scratch/cache/locks", f"{workspace}/scratch/cache/locks", True),
    ):
        assert mounts[inside]["source"] == host
        assert ("ro" in mounts[inside]["options"]) is not is_writable


def test_cuda_is_refused_with_the_reason_of_the_torch_in_the_sibling(stage: Stage, on_gpu_engine: SecondEngine) -> None:
    result = stage.run(Event.release("v1.0.0"), device="cuda")

    assert result.exit_code == 7, result.log
    (error,) = result.annotations_of("error")
    assert "built without CUDA" in error.title
    assert "--build-arg TORCH" in error.message
    assert "Download" not in result.log
    assert containers(WORKERS) == []


def test_a_cancelled_sibling_is_gone_in_four_seconds(stage: Stage, on_gpu_engine: SecondEngine) -> None:
    result = stage.run(Event.release("v1.0.0"), device="auto", cancel_when="Verify")

    assert result.exit_code == 130, result.log
    assert "in the phase `verify`" in result.annotations_of("error")[0].title
    assert result.cancelled_s is not None
    assert result.cancelled_s < 4
    assert containers(WORKERS) == []
    assert stage.hub.repo(REPO) is None


def test_what_a_killed_supervisor_leaves_is_removed_by_the_post_step(stage: Stage, on_gpu_engine: SecondEngine) -> None:
    killed = stage.run(Event.release("v1.0.0"), device="auto", kill_when="Verify")
    (worker,) = containers(WORKERS)
    deadline = time.monotonic() + 10
    while containers(WORKERS, "status=running") and time.monotonic() < deadline:
        time.sleep(0.1)

    assert killed.exit_code == 137
    assert containers(WORKERS, "status=running") == []  # it left by itself, when its standard input was closed
    assert list(stage.runner.temp.glob("lora-merge-*"))
    first = stage.post(killed)
    second = stage.post(killed)

    assert (first.exit_code, second.exit_code) == (0, 0), first.log + second.log
    assert f"Removed the container {worker[:12]}" in first.log
    assert containers(WORKERS) == []
    assert list(stage.runner.temp.glob("lora-merge-*")) == []
    assert "Removed" not in second.log
    assert not first.annotations


def refuses_gpus(image: str) -> bool:
    asked = subprocess.run(["docker", "create", "--gpus", "all", image], capture_output=True, text=True, check=False)
    started = subprocess.run(["docker", "start", asked.stdout.strip()], capture_output=True, text=True, check=False)
    subprocess.run(["docker", "rm", "-f", asked.stdout.strip()], capture_output=True, check=False)
    return "could not select device driver" in started.stderr


def test_an_engine_without_the_toolkit_is_named_with_its_fix(stage: Stage) -> None:
    if not refuses_gpus(str(stage.image)):
        pytest.skip("this engine has the NVIDIA toolkit")

    strict = stage.run(Event.release("v1.0.0"), device="cuda")
    lenient = stage.run(Event.dispatch(), device="auto", mode="verify", merged_path="base", target_repo="", hf_token="")

    assert strict.exit_code == 7, strict.log
    (error,) = strict.annotations_of("error")
    assert "`device` is cuda, but no GPU is visible here, and Docker gives none" in error.title
    assert 'could not select device driver "" with capabilities' in error.message
    assert "nvidia-ctk runtime configure --runtime=docker" in error.message
    assert "Download" not in strict.log
    assert lenient.exit_code == 8, lenient.log  # judged, and found to be the base alone
    assert "Executor: inline, on the CPU. No GPU is visible here, and Docker gives none" in lenient.log
    assert containers(WORKERS) == []


def plain_run(stage: Stage, *arguments: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
    mount = ["-v", f"{stage.runner.workspace}:/github/workspace"]
    flags = ["--adapter-path", "adapter", "--base-model", "base", "--mode", "plan", *arguments]
    command = ["docker", "run", "--rm", "--network", "none", *mount, *options, str(stage.image), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_without_a_socket_the_ways_out_are_named(stage: Stage) -> None:
    code, log = plain_run(stage, "--executor", "docker")

    assert code == 7, log
    assert "There is no Docker socket" in log
    assert "-v /var/run/docker.sock:/var/run/docker.sock" in log


def test_a_pod_of_kubernetes_is_told_its_own_way(stage: Stage) -> None:
    code, log = plain_run(stage, "--device", "cuda", options=("-e", "KUBERNETES_SERVICE_HOST=10.0.0.1"))

    assert code == 7, log
    assert "nvidia.com/gpu: 1" in log
    assert "never falls back to the CPU" in log


def test_a_sibling_that_runs_out_of_memory_is_named_with_its_limit(stage: Stage) -> None:
    socket = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    limit = ("--memory", "160m", "--memory-swap", "160m")  # the sibling inherits it; less than the libraries alone
    options = ("-v", f"{socket}:/var/run/docker.sock", *limit)

    code, log = plain_run(stage, "--executor", "docker", "--device", "cpu", "--work-dir", "work", options=options)

    assert code == 6, log
    assert "out of memory" in log
    assert "The limit here is 0.17 GB" in log
    assert containers(WORKERS) == []


def test_a_cache_of_the_host_outlives_the_job(stage: Stage, tmp_path: Path) -> None:
    stage.hub.add_model("alice/adapter", stage.runner.workspace / "adapter")
    cache = tmp_path / "srv" / "hf-cache"
    inputs = {"adapter_path": "alice/adapter", "mode": "plan", "cache_dir": str(cache)}

    first = stage.run(Event.dispatch(), **inputs)
    second = stage.run(Event.dispatch(), **inputs)

    assert (first.exit_code, second.exit_code) == (0, 0), first.log + second.log
    assert (first.outputs["cache-hit"], second.outputs["cache-hit"]) == ("false", "true")
    assert second.outputs["cache-hit-bytes"] == first.outputs["cache-miss-bytes"]
    assert list(cache.glob("models--*"))
    assert first.summary.count("### Plan") == 1
    assert containers(WORKERS) == []


def test_a_cancelled_job_with_a_cache_of_the_host_ends_in_time(stage: Stage, tmp_path: Path) -> None:
    result = stage.run(
        Event.release("v1.0.0"), cancel_when="Verify", cache_dir=str(tmp_path / "srv" / "hf-cache"), device="cpu"
    )

    assert result.exit_code == 130, result.log
    assert "in the phase `verify`" in result.annotations_of("error")[0].title
    assert len(result.annotations_of("error")) == 1
    assert result.cancelled_s is not None
    assert result.cancelled_s < 7.5
    assert containers(WORKERS) == []


def test_a_folder_of_the_system_is_no_cache(stage: Stage) -> None:
    result = stage.run(Event.dispatch(), mode="plan", cache_dir="/etc/hf")

    assert result.exit_code == 7, result.log
    assert "belongs to the system" in result.annotations_of("error")[0].title


def test_a_runner_can_be_checked(stage: Stage) -> None:
    socket = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    command = ["docker", "run", "--rm", "-v", f"{socket}:/var/run/docker.sock", str(stage.image), "--check-gpu"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    if refuses_gpus(str(stage.image)):
        assert done.returncode == 7, done.stdout
        assert "nvidia-ctk runtime configure" in done.stdout
    else:
        assert "torch" in done.stdout
