"""How a step of the emulated runner is ended from outside: as the runner cancels it, or as the kernel kills it."""

from __future__ import annotations

import signal
import subprocess
import time

_CANCEL = ((signal.SIGINT, 7.5), (signal.SIGTERM, 2.5), (signal.SIGKILL, 30.0))


def cancel(process: subprocess.Popen[bytes]) -> float:
    """Cancel as the runner does, and return how long it took until the process was gone."""
    started = time.monotonic()
    for number, patience_s in _CANCEL:
        process.send_signal(number)
        try:
            process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            continue
        break
    return time.monotonic() - started


def kill(container: str | None, process: subprocess.Popen[bytes]) -> float:
    """End the step without a word to it, and return how long that took."""
    started = time.monotonic()
    if container is None:
        process.kill()
    else:
        subprocess.run(["docker", "kill", container], capture_output=True, check=True)
    process.wait(timeout=30)
    return time.monotonic() - started


def remove_container(name: str) -> bool:
    """Remove the container if it is still there, and say whether it was."""
    found = subprocess.run(
        ["docker", "ps", "-aq", "--filter", f"name=^{name}$"], capture_output=True, text=True, check=True
    )
    if not found.stdout.strip():
        return False
    subprocess.run(["docker", "rm", "-f", name], capture_output=True, check=True)
    return True
