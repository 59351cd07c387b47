"""Process 1, room by room."""
