"""Decisions as values: standard library and contract only. No clock, file, socket, thread or randomness in here."""
