"""Carries out the update lifecycle: feeds ``core.lifecycle``, stores each state, then does what the table says.

``driving`` is the table and the task of the state, ``steps`` what each of its effects does, ``beginning`` when a staged update may begin,
``watching`` its trial, ``telling`` what is said of it, ``ends`` how it ends before its time and how a device goes back.
"""

from skerry_agent.updating.ends import Updating
from skerry_agent.updating.watching import TrialRules

__all__ = ["TrialRules", "Updating"]
