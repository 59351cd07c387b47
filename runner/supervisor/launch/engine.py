"""The Docker engine behind the mounted socket, and what it says about the container that asks.

The engine is asked, nothing is guessed: own container id to own image and the host's paths of the mounts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import docker
import docker.errors
import requests

from runner.protocol.errors import LaunchError
from runner.supervisor.launch.identity import SOCKET, has_engine, own_ids

T = TypeVar("T")
TIMEOUT_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Myself:
    """The container that this process is process 1 of.

    Attributes:
        id: 64 hex digits.
        image: id of its image.
        mounts: path in the container → path on the host.
        labels: that were given to the container, not those of its image.
        network: name of its network mode.
        config: `Config` of the engine's description: environment, command, working folder.
        binds: folders that were mounted by path, as `host:inside[:options]`.
        limits: `HostConfig` entries that bound memory and processors, as they were set.
        devices: `HostConfig` entries that give it devices.
    """

    id: str
    image: str
    mounts: Mapping[str, str]
    labels: Mapping[str, str]
    network: str
    config: Mapping[str, Any]
    binds: tuple[str, ...]
    limits: Mapping[str, Any]
    devices: Mapping[str, Any]

    def host_path(self, path: Path) -> str | None:
        """Return where `path` lies on the host, or None where it is the container's own. The longest mount wins."""
        for inside in sorted(self.mounts, key=len, reverse=True):
            if PurePosixPath(path).is_relative_to(inside):
                below = PurePosixPath(path).relative_to(inside)
                return str(PurePosixPath(self.mounts[inside]) / below)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the engine says of itself.

    Attributes:
        version: of the engine.
        runtimes: names of the OCI runtimes.
        cdi_devices: GPUs that it found through CDI.
        has_cdi: whether it looks for CDI specifications.
    """

    version: str
    runtimes: tuple[str, ...]
    cdi_devices: tuple[str, ...]
    has_cdi: bool


_LIMITS = ("Memory", "MemorySwap", "NanoCpus", "CpuQuota", "CpuPeriod", "CpusetCpus", "CgroupParent")
_DEVICES = ("DeviceRequests", "Devices", "Runtime", "ShmSize")


class Engine:
    """One engine."""

    def __init__(self, client: docker.DockerClient) -> None:
        """Take the client; see `connect`."""
        self.client = client

    @classmethod
    def connect(cls, environ: Mapping[str, str]) -> Engine:
        """Return the engine of the mounted socket, else the one that DOCKER_HOST names.

        Raises:
            LaunchError: there is no socket, or nobody answers.
        """
        if not has_engine(environ):
            raise LaunchError(
                f"There is no Docker socket: {str(SOCKET)!r} is not one.",
                why="The worker's container is started through it. GitHub's runner mounts it into container actions; "
                "rootless Docker, Podman and Kubernetes have none there.",
                fix="Mount it (`docker run -v /var/run/docker.sock:/var/run/docker.sock …`), or give the GPU to this "
                "container and set `executor: inline`.",
            )
        with translated("ask the Docker engine"):
            if SOCKET.is_socket():
                client = docker.DockerClient(base_url=f"unix://{SOCKET}", timeout=TIMEOUT_S)
            else:
                client = docker.DockerClient.from_env(environment=dict(environ), timeout=TIMEOUT_S)
            client.ping()
        return cls(client)

    def facts(self) -> Facts:
        """Return what the engine says of itself."""
        with translated("ask the Docker engine"):
            info = self.client.info()
        found = tuple(
            str(device.get("ID", "")) for device in info.get("DiscoveredDevices") or () if device.get("Source") == "cdi"
        )
        return Facts(
            version=str(info.get("ServerVersion", "")),
            runtimes=tuple(sorted(info.get("Runtimes") or ())),
            cdi_devices=tuple(device for device in found if device.startswith("nvidia.com/gpu=")),
            has_cdi=bool(info.get("CDISpecDirs")),
        )

    def myself(self) -> Myself:
        """Return the container that this process is in.

        Raises:
            LaunchError: it is in none of this engine's.
        """
        for name in own_ids():
            with translated("look at the own container"):
                attributes = self._inspect(name)
            if attributes is not None:
                return _myself(attributes, self._image_labels(attributes["Image"]))
        raise LaunchError(
            "This process is in no container of the Docker engine that it can ask.",
            why="The worker's container is made from the same image, with the same folders; outside a container "
            "there is neither.",
            fix="Run the action's image, or set `executor: inline`.",
        )

    def is_running(self, container: str) -> bool:
        """Return whether a container of that id runs."""
        attributes = self._inspect(container)
        return attributes is not None and bool(attributes["State"]["Running"])

    def remove(self, container: str) -> bool:
        """Kill and remove a container; return False where there is none (any more)."""
        try:
            self.client.api.remove_container(container, force=True, v=True)
        except docker.errors.NotFound:
            return False
        except docker.errors.APIError as error:
            if error.status_code == 409:  # somebody else is removing it
                return False
            raise
        return True

    def labelled(self, *labels: str) -> list[Mapping[str, Any]]:
        """Return every container, running or not, that has all of these labels (`name` or `name=value`)."""
        with translated("list containers"):
            found: list[Mapping[str, Any]] = self.client.api.containers(all=True, filters={"label": list(labels)})
        return found

    def _inspect(self, name: str) -> dict[str, Any] | None:
        try:
            attributes: dict[str, Any] = self.client.api.inspect_container(name)
        except docker.errors.NotFound:
            return None
        return attributes

    def _image_labels(self, image: str) -> Mapping[str, str]:
        try:
            return dict(self.client.api.inspect_image(image)["Config"].get("Labels") or {})
        except docker.errors.ImageNotFound:  # it may be untagged and removed while its container runs
            return {}


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn errors of the engine and of the way to it into a `LaunchError`."""
    try:
        yield
    except (docker.errors.DockerException, requests.RequestException, OSError, json.JSONDecodeError) as error:
        raise LaunchError(
            f"Could not {doing}: {explanation(error)}.",
            why="The Docker engine behind the socket did not answer, or refused.",
            fix="See `docker info` on the runner; or set `executor: inline`.",
        ) from error


def explanation(error: BaseException) -> str:
    """Return the engine's own words, in one line."""
    said = getattr(error, "explanation", None) or error
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    return " ".join(text.split()).rstrip(".")[:500]


def attempt(call: Callable[[], T]) -> T | str:
    """Return what `call` returns, or the engine's words where it refuses."""
    try:
        return call()
    except docker.errors.APIError as error:
        return explanation(error)


def _myself(attributes: Mapping[str, Any], image_labels: Mapping[str, str]) -> Myself:
    config, host = attributes["Config"], attributes["HostConfig"]
    labels = config.get("Labels") or {}
    return Myself(
        id=attributes["Id"],
        image=attributes["Image"],
        mounts={mount["Destination"]: mount["Source"] for mount in attributes["Mounts"] if mount.get("Source")},
        labels={name: value for name, value in labels.items() if image_labels.get(name) != value},
        network=str(host.get("NetworkMode") or "default"),
        config=config,
        binds=tuple(host.get("Binds") or ()),
        devices={name: host[name] for name in _DEVICES if host.get(name)},
        limits={name: host[name] for name in _LIMITS if host.get(name)},
    )
