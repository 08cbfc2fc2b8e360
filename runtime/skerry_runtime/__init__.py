"""How a bundle runs: on a device, a laptop and the server alike.

Owns: opening and checking bundles, engines, transforms, guards, golden proof, validation in a child process, the OpenSSF
Model Signing signature. Leaves to others: which bundle runs where (agent core), fetching (courier), approval (TUF).

Importing the package loads neither numpy nor a runtime; the modules that compute import numpy, and an engine imports its
runtime when it loads a model.
"""

__version__ = "0.1.0"
