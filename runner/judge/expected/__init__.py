"""What a right merge holds: E, the exact weight of every parameter, from base and adapter alone."""
