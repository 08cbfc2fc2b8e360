"""The generations: which worker serves, how the next takes over, what happens when one dies, and how its counts are kept.

A generation is the set of models that one worker serves. ``generation`` is one of them, ``succession`` the order of those of one cell,
``cells`` all of them behind one address, ``on_demand`` one that sleeps, ``passing`` what goes from one to another, ``rings`` what they count, ``unruly`` who must be
replaced although it answers, ``notes`` which model a dead one was at. The process and its channel are ``workers``'.
"""

from skerry_agent.serving.cells import Launch, Serving
from skerry_agent.serving.generation import Generation
from skerry_agent.serving.on_demand import OnDemand
from skerry_agent.serving.rings import SHADOW_RING

__all__ = ["SHADOW_RING", "Generation", "Launch", "OnDemand", "Serving"]
