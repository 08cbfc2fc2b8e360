"""``python -m skerry_agent``: the same as the command ``skerry-agent``."""

from __future__ import annotations

import sys

from skerry_agent.cli import main

sys.exit(main())
