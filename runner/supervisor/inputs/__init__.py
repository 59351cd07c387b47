"""What the user says, typed and checked: where it is read from, what it may be, and every problem at once."""
