"""``python -m skerry_cli`` is the same as ``skerry``."""

from skerry_cli.app import main

main()
