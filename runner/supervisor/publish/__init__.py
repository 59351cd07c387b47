"""From a judged folder to a tagged revision, on a Hub or in a folder.

A `Destination` is looked at and searched before any work, and published to after the verdict.
"""

from runner.supervisor.publish.destination import Destination, FolderDestination, HubDestination, ToPublish
from runner.supervisor.publish.early import EarlyUpload
from runner.supervisor.publish.existing import Release, find_existing
from runner.supervisor.publish.job import finish, publish
from runner.supervisor.publish.wanted import OnExistingTag, Wanted

__all__ = [
    "Destination",
    "EarlyUpload",
    "FolderDestination",
    "HubDestination",
    "ToPublish",
    "OnExistingTag",
    "Release",
    "Wanted",
    "find_existing",
    "finish",
    "publish",
]
