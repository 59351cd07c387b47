"""What goes along with the weights: which files, from which side, and what the user should know of them."""
