"""The commands of ``skerry-agent``, by what they are about: each takes its parsed arguments and returns the exit code."""
