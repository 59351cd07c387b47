"""`python -m bench.peers setup [NAME…]` makes the peers' environments; `list` says what there is."""

from __future__ import annotations

import argparse

from bench.peers import PEERS, PLOT, set_up


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("command", choices=("setup", "list"))
    known = (*(peer.environment for peer in PEERS if not peer.cannot), PLOT)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all of them")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(known):
        parser.error(f"no environment is called {', '.join(sorted(unknown))}")
    if arguments.command == "setup":
        for name in arguments.names or known:
            print(f"{name} …", flush=True)
            set_up(name)
    for peer in PEERS:
        print(f"{peer.name}: {peer.cannot or ('ready' if peer.is_ready else 'not set up')}")


if __name__ == "__main__":
    main()
