"""Answers rows of numbers from standard input with the confirmed model of this device: ``python in_process.py MODEL [SOCKET]``.

One row of comma-separated numbers per line; each gets a line of JSON. Stop it with the end of the input.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from skerry_agent import sdk


def main(model: str, socket: str | None = None) -> None:
    """Answers until the input ends."""
    with sdk.open(model, socket=socket, wait_s=60) as found:
        for line in sys.stdin:
            row = np.array([[float(part) for part in line.split(",")]], np.float32)
            try:
                answer = found.infer({"x": row})
            except sdk.BadInput as error:
                print(json.dumps({"error": str(error)}), flush=True)
                continue
            outputs = {name: value.tolist() for name, value in answer.outputs.items()}
            said = {"version": answer.version, "prediction_id": answer.prediction_id, "outputs": outputs}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
