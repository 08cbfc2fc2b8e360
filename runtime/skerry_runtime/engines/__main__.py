"""``python -m skerry_runtime.engines RUNTIME``: exit code 0 when it works here, 1 with the reason on stdout when it does not."""

from __future__ import annotations

import sys

from skerry_runtime.engines import check_health
from skerry_runtime.errors import Degraded

if __name__ == "__main__":
    try:
        check_health(sys.argv[1])
    except Degraded as fault:
        print(fault)
        sys.exit(1 if fault.code == "runtime_missing" else 2)
