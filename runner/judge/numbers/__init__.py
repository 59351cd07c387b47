"""Stored numbers and their arithmetic: reading rows, comparing them, rounding by chance."""
