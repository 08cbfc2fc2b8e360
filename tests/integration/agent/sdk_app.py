"""An application with a model of its own: infers in threads until SIGTERM, and says how often, in a way that outlives SIGKILL.

Arguments: socket, tally file, threads, pause in seconds, user (empty: as it is). The tally holds two counters per thread, of inferences
begun and ended; standard output gets a line of JSON at the end: inferences by version, labels by outcome.
"""

from __future__ import annotations

import email.parser  # noqa: F401 - before it becomes another user, who may not read it
import json
import mmap
import os
import signal
import sys
import threading
import time
from collections import Counter

import numpy as np
import onnxruntime  # noqa: F401 - so this one
import skerry_runtime.engines.onnx
import skerry_runtime.proof  # noqa: F401
from skerry_agent import sdk

path, tally_path, threads, pause_s, user = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
with open(tally_path, "r+b") as file:
    memory = mmap.mmap(file.fileno(), 16 * threads)
tally = memoryview(memory).cast("Q")
if user:
    os.setgroups([])
    os.setresgid(int(user), int(user), int(user))
    os.setresuid(int(user), int(user), int(user))

versions: Counter[str] = Counter()
labels: Counter[str] = Counter()
lock = threading.Lock()
row = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)

with sdk.open("gas", socket=path, wait_s=30) as model:

    def work(number: int) -> None:
        mine: Counter[str] = Counter()
        while not stop.is_set():
            tally[2 * number] += 1
            answer = model.infer({"x": row})
            tally[2 * number + 1] += 1
            mine[answer.version] += 1
            if pause_s:
                time.sleep(pause_s)
        outcome = model.feedback(answer.prediction_id, 1)
        with lock:
            versions.update(mine)
            labels[outcome] += 1

    print(json.dumps({"ready": model.version}), flush=True)
    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.02)
print(json.dumps({"versions": versions, "labels": labels}), flush=True)
