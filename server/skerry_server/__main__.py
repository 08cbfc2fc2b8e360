"""``python -m skerry_server`` is ``skerry-server``."""

import sys

from skerry_server.cli import main

sys.exit(main())
