"""The action once more, in a container that also has a folder of the host: how `cache-dir` can lie outside the job.

GitHub's runner mounts five folders of its own and takes no others, and nothing of them outlives a job. So where
`cache-dir` is a path that is not mounted here, this container starts itself again: same image, command, environment,
mounts, network and limits, and that folder at the same path. The first one relays what the second one says.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import docker.errors
import requests

from runner.protocol.errors import LaunchError
from runner.supervisor.launch.engine import Engine, Myself, translated
from runner.supervisor.launch.leftovers import reap, run_label
from runner.supervisor.launch.sibling import RUN_LABEL, SUPERVISOR_LABEL

MARK = "LORA_MERGE_STARTED_BY"
SYSTEM = ("bin", "boot", "dev", "etc", "lib", "lib64", "proc", "sbin", "sys", "usr")
END_S = 6


class Again:
    """The second container, which has the folder."""

    def __init__(self, engine: Engine, container: str) -> None:
        """Take a container that was created and not started; see `start_again`."""
        self._engine, self._container = engine, container

    def interrupt(self) -> None:
        """Tell it that the run is cancelled."""
        with contextlib.suppress(docker.errors.DockerException, requests.RequestException):
            self._engine.client.api.kill(self._container, "SIGINT")

    def relay(self) -> int:
        """Run it, write on standard output what it says, and return its exit code. It is removed, however this ends.

        A thread reads what it says, so that a signal, which interrupts this one, loses no byte of it: a cancelled
        container still ends its group in the log and tells what happened.
        """
        api = self._engine.client.api
        all_said = threading.Event()  # not `join`: interrupted by a signal once, it takes the thread as ended (3.11)
        try:
            with translated("run the action with `cache-dir` mounted"):
                said = api.attach(self._container, stream=True, logs=True)
                threading.Thread(target=self._copy, args=(said, all_said), daemon=True).start()
                api.start(self._container)
                all_said.wait()
                return int(api.wait(self._container)["StatusCode"])
        except BaseException:  # cancelled: it was told so, and what it says from now on is the end of the story
            all_said.wait(END_S)
            raise
        finally:
            self._engine.remove(self._container)

    @staticmethod
    def _copy(stream: Iterable[bytes], all_said: threading.Event) -> None:
        try:
            with contextlib.suppress(docker.errors.DockerException, requests.RequestException, OSError):
                for chunk in stream:
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.buffer.flush()
        finally:
            all_said.set()


def start_again(environ: Mapping[str, str], folder: Path, say: Callable[[str], None]) -> Again | None:
    """Return the second container, created and not started; None where `folder` is mounted here already.

    Raises:
        LaunchError: the folder is not one to mount, or the engine refuses.
    """
    engine = Engine.connect(environ)
    myself = engine.myself()
    if environ.get(MARK) or myself.host_path(folder) is not None:
        return None
    if len(folder.parts) < 2 or folder.parts[1] in SYSTEM:
        raise LaunchError(
            f"`cache-dir` is {str(folder)!r}, which belongs to the system.",
            why="That folder of the host would be mounted and written to.",
            fix="Name a folder of its own, such as `/srv/hf-cache`.",
        )
    reap(engine, say)
    with translated("start the action again with `cache-dir` mounted"):
        return Again(engine, _create(engine, myself, environ, folder))


def _create(engine: Engine, myself: Myself, environ: Mapping[str, str], folder: Path) -> str:
    api, config = engine.client.api, myself.config
    host: dict[str, Any] = api.create_host_config(
        binds=[*myself.binds, f"{folder}:{folder}"], network_mode=myself.network, auto_remove=False
    )
    host.update({**myself.limits, **myself.devices})
    created = api.create_container(
        myself.image,
        config.get("Cmd"),
        entrypoint=config.get("Entrypoint"),
        working_dir=config.get("WorkingDir"),
        environment=[*(config.get("Env") or ()), f"{MARK}={myself.id}"],
        user=config.get("User"),
        labels={**myself.labels, RUN_LABEL: run_label(environ), SUPERVISOR_LABEL: myself.id},
        host_config=host,
    )
    return str(created["Id"])
