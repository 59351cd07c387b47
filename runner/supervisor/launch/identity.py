"""Which container this process is in, as the kernel shows it; no engine is asked."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path

SOCKET = Path("/var/run/docker.sock")
# The engine mounts these three from the container's own folder. Only there: on a host the mounts of every container
# are listed, too, at other places.
_MOUNTED = re.compile(r"/containers/([0-9a-f]{64})/\S* /etc/(?:hostname|hosts|resolv\.conf) ")
_GROUP = re.compile(r"/docker[-/]([0-9a-f]{64})")
_SHORT = re.compile(r"[0-9a-f]{12}")


def own_ids(proc: Path = Path("/proc/self")) -> tuple[str, ...]:
    """Return ids that this process's container may have; () where nothing looks like one."""
    ids: list[str] = []
    for file, pattern in (("mountinfo", _MOUNTED), ("cgroup", _GROUP)):
        try:
            ids += pattern.findall((proc / file).read_text())
        except OSError:
            continue
    name = socket.gethostname()
    return tuple(dict.fromkeys([*ids, name] if _SHORT.fullmatch(name) else ids))


def has_engine(environ: Mapping[str, str]) -> bool:
    """Return whether there is an engine to ask: the mounted socket, or the one that DOCKER_HOST names."""
    return SOCKET.is_socket() or bool(environ.get("DOCKER_HOST"))


def is_mounted(folder: Path) -> bool:
    """Return whether `folder`, or the nearest folder above it that exists, is on another file system than the root."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return nearest.stat().st_dev != Path("/").stat().st_dev
