"""The commands: each parses, calls, and shows. What they do is done by the modules above."""
