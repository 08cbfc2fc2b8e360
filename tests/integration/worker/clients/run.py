"""``python -m tests.integration.worker.clients.run CLIENT PORT``: every check of a client, one JSON object of what went wrong in each."""

from __future__ import annotations

import importlib
import json
import sys
import traceback

from tests.integration.worker.clients import asking, checks


def main() -> None:
    name, port = sys.argv[1], int(sys.argv[2])
    asking.count_connections()
    made = importlib.import_module(f"tests.integration.worker.clients.{name}").Client
    found: dict[str, str] = {}
    for check in checks.BY_CLIENT[name]:
        client = made(port)
        try:
            check(client)
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = traceback.format_exc()
        finally:
            client.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
