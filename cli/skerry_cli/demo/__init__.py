"""``skerry demo``: the main job on real sensor data, with real processes and sockets, in a few minutes."""
