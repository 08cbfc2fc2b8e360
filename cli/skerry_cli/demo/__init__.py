"""``skerry demo``: the main job on real sensor data, with real processes and sockets, in a few minutes."""

import os

# Read when onnxruntime is imported, which otherwise makes an id of this machine and reports to its maker.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
