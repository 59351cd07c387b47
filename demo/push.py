"""Push a folder to the Hub in one commit, with the plain client: how the demo's base gets onto the local Hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi


def push(folder: Path, repo_id: str) -> str:
    """Create the model repository `repo_id` with every file of `folder`; returns the commit.

    The endpoint and the token come from `HF_ENDPOINT` and `HF_TOKEN`.
    """
    api = HfApi()
    api.create_repo(repo_id)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    return str(api.create_commit(repo_id, operations, commit_message=f"Add {folder.name}").oid)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; prints the commit, returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.push", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo_id")
    options = parser.parse_args(arguments)
    print(push(options.folder, options.repo_id))
    return 0


if __name__ == "__main__":
    sys.exit(main())
