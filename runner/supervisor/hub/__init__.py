"""The Hub: what is read from it, what may be written to it, and how its failures are told.

`connect` gives a `Hub`; `Hub.snapshot` turns a reference into a folder at an exact commit; `Hub.inspect_target` is the
preflight of a publish. huggingface_hub is imported on first use, because the supervisor must start quickly.
"""

from runner.supervisor.hub.client import MANIFEST, Hub, connect
from runner.supervisor.hub.counting import OnDownload
from runner.supervisor.hub.keyless import Keyless
from runner.supervisor.hub.login import Given, Login
from runner.supervisor.hub.preflight import BRANCH, Refs, Target, Wishes
from runner.supervisor.hub.snapshot import RemoteFile, Snapshot, Traffic, Tree, content_digest
from runner.supervisor.hub.transport import Patience, read_patience
from runner.supervisor.hub.writing import Made

__all__ = [
    "BRANCH",
    "MANIFEST",
    "Given",
    "Hub",
    "Keyless",
    "Login",
    "Made",
    "OnDownload",
    "Patience",
    "Refs",
    "RemoteFile",
    "Snapshot",
    "Target",
    "Traffic",
    "Tree",
    "Wishes",
    "connect",
    "content_digest",
    "read_patience",
]
