"""Models that are run layer by layer, with one layer in memory."""
