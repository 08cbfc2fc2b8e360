"""Runs the confirmed bundle of this device in the application's own process::

    from skerry_agent import sdk

    with sdk.open("gas") as model:
        answer = model.infer({"x": row})

The same proof on the golden cases before the first use, the same transforms and guards, the same counting in the same windows as in
the agent's worker; a newly confirmed bundle takes over between two inferences, and so does a revert. The agent must run, and be asked
over its socket for applications (``apps.socket`` of its configuration): what is approved and confirmed stays its decision.

``lock_updates`` holds updates back while the application is in the middle of something.

``Model`` may be used from several threads: its inferences happen one after the other. It does not survive a fork.
"""

from skerry_runtime.errors import BadInput, EngineFailed

from skerry_agent.errors import AgentError, Degraded, Rejected, Transient
from skerry_agent.sdk.live import Answer
from skerry_agent.sdk.locks import lock_updates, unlock_updates
from skerry_agent.sdk.model import Model, open  # noqa: A004 - as gzip.open and zipfile's are

__all__ = [
    "AgentError", "Answer", "BadInput", "Degraded", "EngineFailed", "Model", "Rejected", "Transient", "lock_updates", "open",
    "unlock_updates",
]  # fmt: skip
