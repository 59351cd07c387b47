"""Process 2, room by room."""
