"""Process 2: torch and no token. It plans and merges one adapter, and has the judge look at the result."""
