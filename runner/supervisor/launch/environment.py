"""What the worker may see of the environment: what finds its libraries and the GPU, and nothing secret."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# Tokens, inputs, ACTIONS_* and GITHUB_* are not among it.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ", "VIRTUAL_ENV")
PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "OMP_", "MKL_", "PYTHON")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",  # a crash of a native library shows the line of Python that called it
    "OMP_WAIT_POLICY": "passive",  # on shared cores, threads that spin made a judgement ten times slower
    # glibc keeps freed memory for the next tensor of that size; without it, a fifth of the time was page faults.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def worker_environment(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the environment of a worker that is a child of this process."""
    passed = {
        name: value for name, value in environ.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    return passed | OFFLINE | {"HF_HOME": str(home)}


def sibling_environment(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the environment of a worker in a container of its own.

    `NVIDIA_*` is left to the engine, which sets it from the request; PATH and HOME are the image's and the worker's.
    """
    passed = worker_environment(environ, home)
    own = {name: value for name, value in passed.items() if not name.startswith("NVIDIA_") and name != "TMPDIR"}
    return own | {"HOME": str(home)}
