"""What a sibling is asked of the engine, and what the kernel tells of this process; nothing is started."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import docker
import pytest

from runner.protocol.errors import LaunchError
from runner.supervisor.inputs.gpus import Gpus
from runner.supervisor.launch.cgroup import Memory, read_memory
from runner.supervisor.launch.engine import Engine, Facts, Myself
from runner.supervisor.launch.environment import sibling_environment, worker_environment
from runner.supervisor.launch.identity import own_ids
from runner.supervisor.launch.sibling import Room, gpu_options, make_mounts, start_sibling
from runner.supervisor.launch.start import Wish, launch, sees_gpu

PLAIN = Facts(version="28.0", runtimes=("runc",), cdi_devices=(), has_cdi=False)
ID = "ab" * 32


def myself(**mounts: str) -> Myself:
    return Myself(
        id=ID, image="sha256:1", mounts=dict(mounts), labels={}, network="default", config={}, binds=(), limits={},
        devices={},
    )  # fmt: skip


def test_a_gpu_is_asked_for_in_every_way_that_the_engine_has() -> None:
    (plain,) = gpu_options(Gpus(), PLAIN)
    toolkit = Facts(version="28.0", runtimes=("nvidia", "runc"), cdi_devices=(), has_cdi=True)
    found = Facts(version="29.0", runtimes=("runc",), cdi_devices=("nvidia.com/gpu=0",), has_cdi=True)

    assert plain[0] == "device request"
    assert [name for name, _ in gpu_options(Gpus(count=2), toolkit)] == ["device request", "runtime nvidia", "CDI"]
    assert [name for name, _ in gpu_options(Gpus(), found)] == ["CDI", "device request"]
    assert gpu_options(Gpus(count=0), toolkit) == [("without a GPU", {})]


@pytest.mark.parametrize(
    ("gpus", "request_fields", "visible", "cdi"),
    [
        (Gpus(), {"Count": -1, "DeviceIDs": []}, "all", ["nvidia.com/gpu=all"]),
        (Gpus(count=2), {"Count": 2, "DeviceIDs": []}, "0,1", ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]),
        (Gpus(devices=("1", "GPU-x")), {"Count": 0, "DeviceIDs": ["1", "GPU-x"]}, "1,GPU-x",
         ["nvidia.com/gpu=1", "nvidia.com/gpu=GPU-x"]),
    ],
)  # fmt: skip
def test_each_way_names_the_same_gpus(gpus: Gpus, request_fields: dict[str, Any], visible: str, cdi: list[str]) -> None:
    facts = Facts(version="28.0", runtimes=("nvidia", "runc"), cdi_devices=(), has_cdi=True)
    ways = dict(gpu_options(gpus, facts))

    (request,) = ways["device request"]["device_requests"]
    assert {name: request[name] for name in request_fields} == request_fields
    assert ways["runtime nvidia"]["environment"] == {"NVIDIA_VISIBLE_DEVICES": visible}
    assert ways["CDI"]["device_requests"][0]["DeviceIDs"] == cdi
    assert ways["CDI"]["device_requests"][0]["Driver"] == "cdi"


def test_the_longest_mount_decides_where_a_path_lies_on_the_host() -> None:
    here = myself(**{"/github/workspace": "/w/m/m", "/github/workspace/data": "/mnt/data", "/github": "/odd"})

    assert here.host_path(Path("/github/workspace/adapter")) == "/w/m/m/adapter"
    assert here.host_path(Path("/github/workspace/data/base")) == "/mnt/data/base"
    assert here.host_path(Path("/github/workspace/database")) == "/w/m/m/database"
    assert here.host_path(Path("/github/home")) == "/odd/home"
    assert here.host_path(Path("/scratch/x")) is None


def room(*, reads: tuple[str, ...], writes: tuple[str, ...]) -> Room:
    return Room(environ={}, reads=tuple(map(Path, reads)), writes=tuple(map(Path, writes)), user="1:1", run="r")


def test_mounts_keep_their_paths_and_only_the_folders_to_write_are_writable() -> None:
    here = myself(**{"/github/workspace": "/w/m/m"})
    wanted = room(
        reads=("/github/workspace/adapter", "/github/workspace", "/models"), writes=("/github/workspace/work",)
    )

    mounts = make_mounts(here, wanted)

    assert [(mount["Target"], mount["Source"], mount["ReadOnly"]) for mount in mounts] == [
        ("/github/workspace", "/w/m/m", True),  # the adapter lies in it; /models is the image's own
        ("/github/workspace/work", "/w/m/m/work", False),
    ]


def test_a_folder_to_write_that_is_not_on_the_host_is_refused() -> None:
    with pytest.raises(LaunchError, match="lies in this container"):
        make_mounts(myself(), room(reads=(), writes=("/scratch/work",)))


def test_an_engine_that_does_not_answer_and_one_that_this_is_not_in_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("runner.supervisor.launch.engine.SOCKET", tmp_path / "absent")
    monkeypatch.setattr("runner.supervisor.launch.engine.own_ids", lambda: ())

    with pytest.raises(LaunchError, match="Could not ask the Docker engine"):
        Engine.connect({"DOCKER_HOST": f"unix://{tmp_path}/docker.sock"})
    with pytest.raises(LaunchError, match="in no container of the Docker engine"):
        Engine(docker.DockerClient(base_url=f"unix://{tmp_path}/docker.sock", version="1.44")).myself()


def test_a_pod_without_a_docker_socket_is_told_how_it_gets_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("runner.supervisor.launch.start.SOCKET", tmp_path / "absent")
    wish = Wish(
        executor="docker", device="cuda", gpus=Gpus(), environ={"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, work=tmp_path,
        lock=None, reads=(), writes=(), owner=(1, 1),
    )  # fmt: skip

    with pytest.raises(LaunchError, match="pod of a Kubernetes runner"):
        launch(wish, log=lambda _line: None, say=lambda _line: None)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', "has no GPUs to give"),
        ("invalid mount config", "did not start the worker"),
    ],
)
def test_what_an_engine_refuses_is_told_in_its_words(said: str, told: str) -> None:
    class Refusing(BaseHTTPRequestHandler):
        """An engine that says what it is, and makes no container."""

        def do_GET(self) -> None:
            self._answer(200, {"ServerVersion": "28.0", "Runtimes": {"runc": {}}})

        def do_POST(self) -> None:
            self._answer(500, {"message": said})

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        engine = Engine(docker.DockerClient(base_url=f"tcp://127.0.0.1:{server.server_port}", version="1.44"))
        with pytest.raises(LaunchError, match=told) as raised:
            start_sibling(engine, myself(), room(reads=(), writes=()), Gpus(), log=lambda _line: None)
        server.shutdown()
    assert said in raised.value.problem.what


def test_a_container_knows_itself_and_a_host_is_not_fooled_by_its_containers(tmp_path: Path) -> None:
    line = "{n} 30 254:0 /var/lib/docker/containers/{id}/{file} {at} rw,relatime - ext4 /dev/vda rw\n"
    (tmp_path / "mountinfo").write_text(line.format(n=1, id="cd" * 32, file="mounts/shm", at="/var/lib/docker/x"))
    assert own_ids(tmp_path) == ()

    (tmp_path / "mountinfo").write_text(line.format(n=1, id=ID, file="hostname", at="/etc/hostname"))
    assert own_ids(tmp_path) == (ID,)
    (tmp_path / "mountinfo").unlink()
    (tmp_path / "cgroup").write_text(f"4:memory:/docker/{ID}\n")
    assert own_ids(tmp_path) == (ID,)


def test_the_kernels_notes_of_memory_are_read_in_both_versions(tmp_path: Path) -> None:
    assert read_memory(tmp_path) is None
    second = tmp_path / "sys/fs/cgroup"
    second.mkdir(parents=True)
    (second / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    (second / "memory.max").write_text("max\n")
    assert read_memory(tmp_path) == Memory(kills=2, limit_bytes=None)
    (second / "memory.max").write_text("1048576\n")
    assert read_memory(tmp_path) == Memory(kills=2, limit_bytes=1 << 20)
    (second / "memory.events").unlink()
    first = second / "memory/jobs/a"
    first.mkdir(parents=True)
    (first / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    (first / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("7:cpu:/x\n4:memory:/jobs/a\n")
    assert read_memory(tmp_path) == Memory(kills=5, limit_bytes=None)


def test_a_gpu_is_seen_by_its_device_files(tmp_path: Path) -> None:
    assert not sees_gpu({}, tmp_path)
    (tmp_path / "nvidia0").touch()
    assert sees_gpu({}, tmp_path)
    assert not sees_gpu({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)


def test_no_secret_reaches_a_worker_wherever_it_runs(tmp_path: Path) -> None:
    environ = {
        "PATH": "/bin", "HOME": "/github/home", "HF_TOKEN": "x", "INPUT_HF-TOKEN": "x", "ACTIONS_RUNTIME_TOKEN": "x",
        "GITHUB_TOKEN": "x", "NVIDIA_VISIBLE_DEVICES": "all", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }  # fmt: skip

    inline, sibling = worker_environment(environ, tmp_path), sibling_environment(environ, tmp_path)

    assert "x" not in {*inline.values(), *sibling.values()}
    assert inline["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert "NVIDIA_VISIBLE_DEVICES" not in sibling  # the engine sets it, from the request
    assert sibling["HOME"] == str(tmp_path)
    assert sibling["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
