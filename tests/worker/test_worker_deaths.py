"""How the worker died is told from a real process that dies so."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from runner.protocol.errors import LaunchError, NotEnoughMemory
from runner.supervisor.launch.channel import End
from runner.supervisor.launch.pickles import unpickle
from runner.supervisor.launch.worker import Worker


@dataclass
class Shell:
    """A channel to a shell script; `killed_for_memory` is what the control group's counter would say."""

    script: str
    killed_for_memory: bool | None
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(["sh", "-c", self.script], stdout=subprocess.PIPE, text=True)

    def lines(self) -> Iterator[str]:
        assert self.process.stdout is not None
        yield from self.process.stdout

    def send(self, line: str) -> None:
        raise AssertionError

    def wait(self) -> End:
        return End(
            exit_code=self.process.wait(), ran_out_of_memory=self.killed_for_memory, memory_limit_bytes=5_000_000_000
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


DEATHS = {
    "killed for memory": ("kill -KILL $$", True, NotEnoughMemory, "out of memory"),
    "killed, who knows why": ("kill -KILL $$", None, NotEnoughMemory, "was killed"),
    "killed by a person": ("kill -KILL $$", False, LaunchError, "was killed"),
    "crashed": ("kill -SEGV $$", False, LaunchError, "crashed \\(signal SIGSEGV"),
    "ended by a signal": ("kill -TERM $$", False, LaunchError, "died \\(signal SIGTERM"),
    "ended by itself": ("exit 3", False, LaunchError, "died \\(exit code 3"),
    "another program": ("echo Segmentation fault", False, LaunchError, "no event: 'Segmentation fault'"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_each_death_has_its_name(death: str) -> None:
    script, killed_for_memory, family, said = DEATHS[death]
    with (
        Worker(lambda _relay: Shell(script, killed_for_memory), log=lambda _line: None) as worker,
        pytest.raises(family, match=said) as raised,
    ):
        worker.wait_until_ready()
    if killed_for_memory:
        assert "5.00 GB" in raised.value.problem.why


def _kill_child(name: str) -> None:
    """Send SIGKILL to the child of this process that has `name` in its command line, as soon as there is one."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for task in Path("/proc/self/task").iterdir():
            for child in (task / "children").read_text().split():
                if name in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(int(child), signal.SIGKILL)
                    return
        time.sleep(0.001)


def _unpickle(folder: Path, **environ: str) -> None:
    unpickle(folder / "source", folder / "target", "pytorch_model.bin", environ=os.environ | environ, home=folder)


def test_the_death_of_what_converts_pickles_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="died"):
        _unpickle(tmp_path, PYTHONHOME="/nowhere")

    killer = threading.Thread(target=_kill_child, args=("runner.worker.unpickle",))
    killer.start()
    with pytest.raises(NotEnoughMemory, match="SIGKILL"):
        _unpickle(tmp_path)
    killer.join()
