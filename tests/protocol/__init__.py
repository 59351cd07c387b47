"""What both processes know."""
