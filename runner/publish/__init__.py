"""From a judged folder to a tagged revision: `find_existing` before any work, `publish` after the verdict."""

from runner.publish.existing import OnExistingTag, Release, find_existing
from runner.publish.job import publish

__all__ = ["OnExistingTag", "Release", "find_existing", "publish"]
