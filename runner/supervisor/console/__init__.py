"""What a run shows while it goes on: groups and lines in a workflow's log, a live display on a terminal."""
