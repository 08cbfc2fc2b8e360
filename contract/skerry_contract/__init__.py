"""What the agent, the server and the operator's tool must agree on.

Owns: identifiers, the bundle manifest, the group document, the records on MQTT, the topic grammar, the histograms that
merge exactly, and the paths of the update repository. Pure: standard library and msgspec; no clock, file, socket, thread
or randomness. Everything here takes bytes or values and returns values.
"""

__version__ = "0.1.0"
