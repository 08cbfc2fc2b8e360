"""Asks every agent below a folder for predictions, about ten times a second each, until it is stopped.

Usage: python first_application.py DEVICES_FOLDER
"""

from __future__ import annotations

import json
import random
import sys
import time
import urllib.request
from pathlib import Path


def ask(serving: Path, row: list[float]) -> str:
    """One inference by the Open Inference Protocol, from the agent whose address stands in ``serving``."""
    address = json.loads(serving.read_text())
    url = f"http://{address['host']}:{address['port']}/v2/models/iris/infer"
    body = {"inputs": [{"name": "X", "shape": [1, 4], "datatype": "FP32", "data": row}]}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return str(json.load(answer)["model_version"])


def main(folder: Path) -> None:
    """Prints once a second how many answers each version gave, and what failed after a device's first answer."""
    answers: dict[str, int] = {}
    answered: set[Path] = set()
    while True:
        for _ in range(10):
            for serving in sorted(folder.glob("*/state/run/serving.json")):
                try:
                    version = ask(serving, [random.uniform(0.1, 8.0) for _ in range(4)])
                    answered.add(serving)
                except (OSError, ValueError, KeyError):
                    version = "failed" if serving in answered else "nothing to answer yet"
                answers[version] = answers.get(version, 0) + 1
            time.sleep(0.1)
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
