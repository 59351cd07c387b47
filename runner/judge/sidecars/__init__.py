"""Every file beside the weights, by a table of the judge's own."""
