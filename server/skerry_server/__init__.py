"""The fleet server: registry, update repository, rollouts, enrolment, and the telemetry that devices send.

``skerry-server run`` is everything in one process, beside a child process for the embedded broker. What a device may run
is decided by signatures it checks itself; this server chooses among what the approvers signed.
"""

from skerry_contract import __version__

__all__ = ["__version__"]
