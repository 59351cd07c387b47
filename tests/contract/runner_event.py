"""What starts a workflow, with the payload and the variables that GitHub gives."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What starts the workflow."""

    name: str
    payload: Any = field(default_factory=dict)
    ref: str = "refs/heads/main"

    @classmethod
    def release(cls, tag: str, **release: Any) -> Event:
        fields = {"tag_name": tag, "draft": False, "prerelease": False, "name": tag, "body": "", **release}
        return cls(name="release", payload={"action": "published", "release": fields}, ref=f"refs/tags/{tag}")

    @classmethod
    def pushed_tag(cls, tag: str) -> Event:
        return cls(name="push", payload={"ref": f"refs/tags/{tag}"}, ref=f"refs/tags/{tag}")

    @classmethod
    def dispatch(cls) -> Event:
        return cls(name="workflow_dispatch", payload={"inputs": None})

    @classmethod
    def pull_request(cls) -> Event:
        return cls(name="pull_request", payload={"action": "opened", "number": 7}, ref="refs/pull/7/merge")

    @property
    def content(self) -> bytes:
        """Content of the file that GITHUB_EVENT_PATH names."""
        return self.payload if isinstance(self.payload, bytes) else json.dumps(self.payload).encode()

    def variables(self) -> dict[str, str]:
        """The variables of the `github` context that depend on the event alone, without `GITHUB_`."""
        kind, name = self.ref.split("/", 2)[1:]
        return {
            "ACTIONS": "true",
            "ACTION": "__self",
            "ACTOR": "octocat",
            "API_URL": "https://api.github.com",
            "EVENT_NAME": self.name,
            "JOB": "merge",
            "REF": self.ref,
            "REF_NAME": name,
            "REF_PROTECTED": "false",
            "REF_TYPE": "tag" if kind == "tags" else "branch",
            "RUN_ATTEMPT": "1",
            "RUN_ID": "6091",
            "RUN_NUMBER": "12",
            "SERVER_URL": "https://github.com",
            "SHA": "f" * 40,
            "TRIGGERING_ACTOR": "octocat",
            "WORKFLOW": "release",
        }
