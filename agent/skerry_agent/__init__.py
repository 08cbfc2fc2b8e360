"""The agent: runs bundles on a device, counts what they do while offline, takes signed updates.

The supervisor (``skerry_agent.supervisor``) is small and imports neither numpy nor tuf nor cryptography; models live in
worker processes (``skerry_agent.worker``), the update security in short-lived couriers (``skerry_agent.courier``).
"""

__version__ = "0.1.0"
