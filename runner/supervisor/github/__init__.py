"""GitHub's runner: the commands and files that it reads, and the event that started the workflow."""
