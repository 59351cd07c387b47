"""What both processes know: the job and its events, options, plan and verdict in numbers, errors and exit codes."""
