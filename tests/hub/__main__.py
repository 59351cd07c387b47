"""Serve a local Hub from the command line, until stdin is closed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.hub.server import LocalHub


def main() -> None:
    """Print one JSON line `{"endpoint", "user", "token"}` (a write token), then serve until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder that keeps everything; made if absent")
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    parser.add_argument("--user", default="demo", help="user that is added, with a write token")
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--api-host", default="localhost", help="name under which clients reach the API")
    parser.add_argument("--blob-host", default="127.0.0.1", help="name under which clients reach the blobs")
    args = parser.parse_args()
    with LocalHub.start(
        args.root, bind=args.bind, port=args.port, api_host=args.api_host, blob_host=args.blob_host
    ) as hub:
        hub.add_user(args.user)
        line = {"endpoint": hub.endpoint, "user": args.user, "token": hub.add_token(args.user)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
