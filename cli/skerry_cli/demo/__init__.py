"""``skerry demo``: the main job on real sensor data, with real processes and sockets, in a few minutes."""

import os

# Read when onnxruntime is imported, whose telemetry otherwise makes an id of this machine below the home folder.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
