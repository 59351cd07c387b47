"""Workers that start at once: a process that has torch imported forks one for each run of the action.

The supervisor under test is a process of its own, started as users start it, and it starts its worker as always. Only
the program that it takes for Python is ours: it hands its environment, folder and descriptors to the warm process,
which forks a child that runs `runner.worker.main`. So a run costs no five seconds of imports, and everything else is
real.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner.supervisor.launch import worker_environment

ROOT = Path(__file__).resolve().parent.parent.parent

# Reads the request of one launcher after the other, forks, and tells each launcher how its worker ended.
_WARM = """
import json, os, select, signal, socket, sys
from runner.worker.libraries import quick_imports
with quick_imports():
    from transformers import AutoTokenizer, LlamaForCausalLM
    import runner.worker.merge.job, runner.worker.merge.prepare, runner.judge.judge
import runner.worker.main

def work(request, descriptors):
    for target, descriptor in zip(request["numbers"], descriptors):
        os.dup2(descriptor, 100 + target)  # none of the numbers is taken before all are free
    for target in request["numbers"]:
        os.dup2(100 + target, target)
        os.close(100 + target)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["folder"])
    os.setsid()
    sys.argv = request["arguments"]
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    code = 1
    try:
        code = runner.worker.main.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
print("warm", flush=True)
workers = {}
while True:
    ready, _, _ = select.select([0, listening, *workers.values()], [], [], 0.02)
    if 0 in ready:
        break  # standard input was closed: nobody needs workers any more
    for connection in ready:
        if connection is listening:
            accepted, _ = listening.accept()
            text, descriptors, _, _ = socket.recv_fds(accepted, 1 << 20, 64)
            child = os.fork()
            if not child:
                listening.close()
                accepted.close()
                work(json.loads(text), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            workers[child] = accepted
    for child, connection in list(workers.items()):
        if connection in ready:  # the launcher was ended, so its worker is, too
            os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            del workers[child]
            try:
                connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            except OSError:
                pass
            connection.close()
for child in workers:
    os.kill(child, signal.SIGKILL)
"""

# What the supervisor takes for Python.
_LAUNCHER = """#!{python} -ES
import json, os, signal, socket, sys
if sys.argv[1:3] != ["-m", "runner.worker.main"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
wanted = []
for name in os.listdir("/proc/self/fd"):
    try:
        os.fstat(int(name))
    except OSError:
        continue  # the listing's own
    wanted.append(int(name))
connection = socket.socket(socket.AF_UNIX)
connection.connect({socket!r})
request = {{"arguments": sys.argv, "environ": dict(os.environ), "folder": os.getcwd(), "numbers": wanted}}
socket.send_fds(connection, [json.dumps(request).encode()], wanted)
for number in wanted:
    if number != 2:
        os.close(number)  # the worker alone reads and writes them
code = int(connection.recv(20) or b"1")
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""

_SITE = """import os, sys
if "LORA_TEST_PYTHON" in os.environ:
    sys.executable = os.environ["LORA_TEST_PYTHON"]
sys.path.remove(os.path.dirname(__file__))
del sys.modules["sitecustomize"]
try:
    import sitecustomize  # the next one on the path: tools.refusals has one
except ImportError:
    pass
"""


@dataclass(frozen=True)
class Warmth:
    """What a supervisor needs in its environment to get warm workers."""

    environ: dict[str, str]


@contextmanager
def warmed(folder: Path) -> Iterator[Warmth]:
    """Yield where warm workers are; the process that forks them ends with the block, and its workers with it.

    Args:
        folder: exists; gets the socket and the launcher.
    """
    address, launcher, site = folder / "warm.socket", folder / "python", folder / "site"
    launcher.write_text(_LAUNCHER.format(python=sys.executable, socket=str(address)))
    launcher.chmod(0o755)
    site.mkdir()
    (site / "sitecustomize.py").write_text(_SITE)
    process = subprocess.Popen(
        [sys.executable, "-c", _WARM, str(address)],
        cwd=ROOT,
        env=worker_environment(os.environ, folder / "home") | {"CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "warm\n"
        paths = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        yield Warmth({"LORA_TEST_PYTHON": str(launcher), "PYTHONPATH": paths})
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
