"""Decisions of the server as pure functions of recorded evidence. No clock, file, socket, thread or randomness."""
