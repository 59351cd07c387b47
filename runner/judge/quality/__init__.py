"""What is measured beside the verdict: 16-bit arithmetic and continuations."""
