"""Where the worker runs: a child of this process, or a container of its own. Chosen here, and told with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runner.protocol.errors import LaunchError
from runner.supervisor.inputs.gpus import Gpus
from runner.supervisor.launch.channel import Channel
from runner.supervisor.launch.environment import sibling_environment, worker_environment
from runner.supervisor.launch.identity import SOCKET
from runner.supervisor.launch.inline import Child
from runner.supervisor.launch.worker import Worker
from runner.supervisor.owner import give

_DEVICES = ("nvidia0", "nvidiactl", "dxg", "kfd")  # NVIDIA's, WSL's, AMD's
_NEVER_SILENT = (
    "GitHub starts container actions without `--gpus`, and `device: cuda` never falls back to the CPU. {reason}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What kind of worker is wanted.

    Attributes:
        executor: "auto", "inline" or "docker".
        device: "auto", "cuda" or "cpu".
        gpus: which GPUs it may use.
        environ: of the supervisor.
        work: folder of the run, for the caches of the worker's libraries.
        lock: descriptor of the lock on that folder, or None.
        reads: folders that it may have to read.
        writes: folders that it may write; in a sibling these only.
        owner: user and group that its files are to belong to.
    """

    executor: str
    device: str
    gpus: Gpus
    environ: Mapping[str, str]
    work: Path
    lock: int | None
    reads: tuple[Path, ...]
    writes: tuple[Path, ...]
    owner: tuple[int, int]

    @property
    def wants_gpu(self) -> bool:
        """Whether it is to use a GPU if there is one."""
        return self.device != "cpu" and not self.gpus.is_none


def launch(wish: Wish, *, log: Callable[[str], None], say: Callable[[str], None]) -> Worker:
    """Return a worker that has been started.

    Args:
        wish: what is wanted.
        log: gets every line that the worker's libraries print.
        say: is told where it runs, and why.

    Raises:
        LaunchError: it cannot be had, and may not be replaced by another.
    """
    reason = _reason_for_inline(wish)
    if reason is not None:
        say(f"Executor: inline ({reason}).")
        return Worker(partial(_inline, wish), log)
    try:
        worker = Worker(lambda relay: _docker(wish, log=relay, say=say), log)
    except LaunchError as error:
        if wish.executor == "docker":
            raise
        if wish.device == "cuda":
            raise _no_gpu(error) from error
        say(f"Executor: inline, on the CPU. No GPU is visible here, and Docker gives none: {error.problem.what}")
        return Worker(partial(_inline, wish), log)
    why = "`executor` says so" if wish.executor == "docker" else "a GPU is wanted, and none is visible here"
    say(f"Executor: docker ({why}), GPUs {wish.gpus.display if wish.wants_gpu else 'none'}.")
    return worker


def sees_gpu(environ: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Return whether the device files of a GPU are here; what can be computed on it, the worker finds out."""
    return environ.get("CUDA_VISIBLE_DEVICES") != "" and any((devices / name).exists() for name in _DEVICES)


def _reason_for_inline(wish: Wish) -> str | None:
    if wish.executor == "docker":
        return None
    if wish.executor == "inline":
        return "`executor` says so"
    if not wish.wants_gpu:
        return "no GPU is wanted"
    if sees_gpu(wish.environ):
        return "a GPU is visible here"
    return None


def _inline(wish: Wish, relay: Callable[[str], None]) -> Channel:
    environ = worker_environment(wish.environ, wish.work / "worker")
    visible = wish.gpus.visible_devices
    return Child(environ if visible is None else environ | {"CUDA_VISIBLE_DEVICES": visible}, log=relay, lock=wish.lock)


def _docker(wish: Wish, *, log: Callable[[str], None], say: Callable[[str], None]) -> Channel:
    if wish.environ.get("KUBERNETES_SERVICE_HOST") and not wish.environ.get("DOCKER_HOST"):
        _refuse_kubernetes()
    # The Docker SDK takes a quarter of a second, for those who need it.
    from runner.supervisor.launch.engine import Engine
    from runner.supervisor.launch.leftovers import reap, run_label
    from runner.supervisor.launch.sibling import Room, start_sibling

    engine = Engine.connect(wish.environ)
    myself = engine.myself()
    reap(engine, say)
    home = wish.work / "worker"
    home.mkdir(parents=True, exist_ok=True)
    user, group = wish.owner if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for folder in wish.writes:
        give((folder, *folder.rglob("*")), (user, group))
    room = Room(
        environ=sibling_environment(wish.environ, home),
        reads=wish.reads,
        writes=wish.writes,
        user=f"{user}:{group}",
        run=run_label(wish.environ),
    )
    return start_sibling(engine, myself, room, wish.gpus if wish.wants_gpu else Gpus(count=0), log=log)


def _refuse_kubernetes() -> None:
    if SOCKET.is_socket():  # a pod with a daemon beside it
        return
    raise LaunchError(
        "This is a pod of a Kubernetes runner, without a Docker socket.",
        why="In Kubernetes mode the runner starts a pod instead of a container, and only its template can ask for a "
        "GPU.",
        fix="In the hook template (ACTIONS_RUNNER_CONTAINER_HOOK_TEMPLATE), give the container `$job` "
        "`resources: { limits: { nvidia.com/gpu: 1 } }`, and leave `executor` out.",
    )


def _no_gpu(error: LaunchError) -> LaunchError:
    problem = error.problem
    return LaunchError(
        f"`device` is cuda, but no GPU is visible here, and Docker gives none. {problem.what}",
        why=_NEVER_SILENT.format(reason=problem.why),
        fix=f"{problem.fix} Other ways: make nvidia the default runtime of the runner's Docker (`sudo nvidia-ctk "
        "runtime configure --runtime=docker --set-as-default && sudo systemctl restart docker`), run the image "
        "yourself with `docker run --gpus all`, or set `device: cpu`.",
    )
