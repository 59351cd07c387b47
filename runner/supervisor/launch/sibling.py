"""A worker in a container of its own: the same image, the folders that it needs, a GPU, and nothing else.

No socket, no token, no network, no capability, a read-only root. The engine closes the worker's standard input when
this process is gone, however it ended, and the worker then leaves by itself.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from docker.types import DeviceRequest, Mount
from docker.utils.socket import frames_iter

from runner.protocol.errors import LaunchError
from runner.supervisor.inputs.gpus import Gpus
from runner.supervisor.launch.channel import STOP_GRACE_S, End
from runner.supervisor.launch.engine import Engine, Facts, Myself, attempt, translated

RUN_LABEL = "lora-merge.run"
SUPERVISOR_LABEL = "lora-merge.supervisor"
SHM_BYTES = 1 << 30
ROOT = Path(__file__).resolve().parents[3]
STDOUT = 1
_END = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What the worker's container gets.

    Attributes:
        environ: all of its environment.
        reads: folders that it may read; those that are not mounted here are the image's own, or nothing.
        writes: folders that it may write, too; they must lie on the host.
        user: `uid:gid`.
        run: value of the label `lora-merge.run`.
    """

    environ: Mapping[str, str]
    reads: tuple[Path, ...]
    writes: tuple[Path, ...]
    user: str
    run: str


class Sibling:
    """A `Channel` to a container."""

    def __init__(self, engine: Engine, container: str, stream: Any, *, log: Callable[[str], None]) -> None:
        """Take a container that runs, and the stream that is attached to it; see `start_sibling`."""
        self._engine, self.container, self._stream = engine, container, stream
        self._socket = stream._sock  # the SDK's own way to write to what is attached, and to end it
        self._stopping = threading.Lock()
        self._log = log
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def lines(self) -> Iterator[str]:
        """Yield what it writes on standard output."""
        while (line := self._queue.get()) is not _END:
            yield line
        self._queue.put(_END)

    def send(self, line: str) -> None:
        """Write a line on its standard input."""
        with contextlib.suppress(OSError):
            self._socket.sendall(line.encode())

    def wait(self) -> End:
        """Wait until it has ended, and say how."""
        with translated("wait for the worker's container"):
            self._engine.client.api.wait(self.container)
            attributes = self._engine.client.api.inspect_container(self.container)
        self._reader.join(timeout=1.0)
        state, code = attributes["State"], int(attributes["State"]["ExitCode"])
        return End(
            exit_code=128 - code if 128 < code <= 128 + signal.NSIG else code,
            ran_out_of_memory=bool(state["OOMKilled"]),
            memory_limit_bytes=attributes["HostConfig"].get("Memory") or None,
        )

    def stop(self) -> None:
        """Stop and remove the container; a second thread waits for the first."""
        api = self._engine.client.api
        with self._stopping:
            with contextlib.suppress(requests.RequestException, LaunchError):
                if self._engine.is_running(self.container):
                    attempt(lambda: api.stop(self.container, timeout=int(STOP_GRACE_S)))
                attempt(lambda: self._engine.remove(self.container))
            with contextlib.suppress(OSError):
                self._socket.close()
                self._stream.close()

    def _read(self) -> None:
        rests = {STDOUT: b"", 2: b""}
        with contextlib.suppress(OSError, ValueError):
            for number, content in frames_iter(self._stream, tty=False):
                *lines, rests[number] = (rests[number] + content).split(b"\n")
                for line in lines:
                    self._take(number, line)
        for number, rest in rests.items():
            if rest:
                self._take(number, rest)
        self._queue.put(_END)

    def _take(self, number: int, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        if number == STDOUT:
            self._queue.put(text)
        else:
            self._log(text)


def start_sibling(engine: Engine, myself: Myself, room: Room, gpus: Gpus, *, log: Callable[[str], None]) -> Sibling:
    """Start a worker in a container of its own.

    Args:
        engine: that runs this container.
        myself: this container.
        room: what the worker gets.
        gpus: which GPUs.
        log: gets every line that the worker's libraries print.

    Raises:
        LaunchError: the engine refuses, with its words; or a folder to write does not lie on the host.
    """
    mounts = make_mounts(myself, room)
    refusals = []
    for way, options in gpu_options(gpus, engine.facts()):
        started = attempt(lambda options=options: _start(engine, myself, room, mounts, options))  # type: ignore[misc]
        if not isinstance(started, str):
            container, stream = started
            return Sibling(engine, container, stream, log=log)
        refusals.append(f"{way}: {started}")
    raise _refused(refusals)


def gpu_options(gpus: Gpus, facts: Facts) -> list[tuple[str, dict[str, Any]]]:
    """Return the ways to ask this engine for the GPUs, the best first, each with its name."""
    if gpus.is_none:
        return [("without a GPU", {})]
    count = -1 if gpus.count is None else gpus.count
    chosen: dict[str, Any] = {"device_ids": list(gpus.devices)} if gpus.devices else {"count": count}
    request = DeviceRequest(**chosen, capabilities=[["gpu", "compute", "utility"]])
    ways: list[tuple[str, dict[str, Any]]] = [("device request", {"device_requests": [request]})]
    if "nvidia" in facts.runtimes:
        visible = ",".join(gpus.devices) or ("all" if gpus.count is None else gpus.visible_devices or "")
        ways.append(("runtime nvidia", {"runtime": "nvidia", "environment": {"NVIDIA_VISIBLE_DEVICES": visible}}))
    if facts.has_cdi or facts.cdi_devices:
        names = gpus.devices or (("all",) if gpus.count is None else tuple(str(index) for index in range(gpus.count)))
        devices = [f"nvidia.com/gpu={name}" for name in names]
        cdi = ("CDI", {"device_requests": [DeviceRequest(driver="cdi", device_ids=devices)]})
        ways.insert(0 if facts.cdi_devices else len(ways), cdi)
    return ways


def make_mounts(myself: Myself, room: Room) -> list[Mount]:
    """Return the worker's mounts: every folder at the path that it has here.

    Raises:
        LaunchError: a folder to write is in this container's own layer, which no other container sees.
    """
    mounts = []
    for folder in _outermost(room.reads):
        source = myself.host_path(folder)
        if source is not None:
            mounts.append(Mount(str(folder), source, type="bind", read_only=True))
    for folder in room.writes:
        source = myself.host_path(folder)
        if source is None:
            raise LaunchError(
                f"The folder {str(folder)!r} lies in this container, not on the host.",
                why="The worker runs in a container of its own, and could not write there.",
                fix="Set `work-dir` to a folder in the workspace, or in `cache-dir`.",
            )
        mounts.append(Mount(str(folder), source, type="bind"))
    return mounts


def _outermost(folders: Sequence[Path]) -> list[Path]:
    unique = sorted(set(folders), key=lambda folder: len(folder.parts))
    return [
        folder
        for index, folder in enumerate(unique)
        if not any(folder.is_relative_to(other) for other in unique[:index])
    ]


def _start(
    engine: Engine, myself: Myself, room: Room, mounts: Sequence[Mount], gpu: Mapping[str, Any]
) -> tuple[str, Any]:
    api = engine.client.api
    options = {name: value for name, value in gpu.items() if name != "environment"}
    host = api.create_host_config(
        mounts=list(mounts),
        network_mode="none",
        init=True,
        read_only=True,
        tmpfs={"/tmp": ""},  # noqa: S108  (a mount point in the new container)
        shm_size=SHM_BYTES,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        auto_remove=False,  # how it ended is read before it is removed
        **options,
    )
    host.update(myself.limits)
    created = api.create_container(
        myself.image,
        ["-m", "runner.worker.main"],
        entrypoint=[sys.executable],
        name=f"lora-merge-worker-{uuid.uuid4().hex[:12]}",
        working_dir=str(ROOT),
        environment=dict(room.environ) | dict(gpu.get("environment", {})),
        user=room.user,
        labels={**myself.labels, RUN_LABEL: room.run, SUPERVISOR_LABEL: myself.id},
        stdin_open=True,  # and closed by the engine when this process is gone
        host_config=host,
    )
    container = str(created["Id"])
    try:
        stream = api.attach_socket(container, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        api.start(container)
    except BaseException:
        engine.remove(container)
        raise
    return container, stream


def _refused(refusals: Sequence[str]) -> LaunchError:
    said = "; ".join(refusals)
    if "could not select device driver" in said:
        return LaunchError(
            f"The Docker engine has no GPUs to give: {said}.",
            why="The NVIDIA container toolkit is not installed on this host, or the engine was started before it was.",
            fix="Install the package `nvidia-container-toolkit`, then run `sudo nvidia-ctk runtime configure "
            "--runtime=docker && sudo systemctl restart docker`.",
        )
    return LaunchError(
        f"The Docker engine did not start the worker: {said}.",
        why="These are the engine's own words.",
        fix="If they name a device or the driver, check `nvidia-smi` on the host and the input `gpus`; else see "
        "docs/gpu-runners.md, or set `executor: inline`.",
    )
