"""``python -m skerry_agent.worker --control-fd N --listen-fd M [--listen-fd ...]``: started by the supervisor, of no use by hand."""

from __future__ import annotations

import os
import sys

from skerry_agent.worker import lean

if __name__ == "__main__":
    lean.import_event_loops(uvloop=not os.environ.get("SKERRY_NO_UVLOOP"))

    from skerry_agent.worker.main import main

    sys.exit(main())
