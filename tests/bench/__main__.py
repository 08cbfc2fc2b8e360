"""``python -m tests.bench [name ...]``: runs benchmarks, one JSON line each; all of them without a name.

A benchmark is a module of this folder with a function ``run() -> Result``; its name is the module's. Each measures beside its
peer in one run, on whatever machine this is. Peers that clash with our dependencies get an environment of their own under
``.bench/`` at first use.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tests.bench.result import Result

NOT_BENCHMARKS = {
    "__main__", "bad_link", "delta_measuring", "finetunes", "gas_windows", "http_client", "http_load", "image_bundle", "judge_simulation", "litserve_peer", "mlserver_grpc_client", "mlserver_peer",
    "mqtt_load", "peer_environment", "peer_server", "result", "swapping", "whylogs_peer",
}  # fmt: skip


def names() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_BENCHMARKS)


def main(wanted: list[str]) -> int:
    known = names()
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = 0
    for name in wanted or known:
        try:
            result: Result = importlib.import_module(f"tests.bench.{name}").run()
        except Exception as error:
            # One that cannot run here must not hide the figures of the others.
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
            continue
        print(result.line(), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
