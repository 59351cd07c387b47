"""What is measured beside the verdict: 16-bit arithmetic, continuations, tasks of the user."""
