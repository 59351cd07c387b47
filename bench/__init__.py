"""Programs that measure us beside others, side by side in one run."""
