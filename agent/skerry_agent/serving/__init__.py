"""The generations: which worker serves, how the next takes over, what happens when one dies, and how its counts are kept.

A generation is the set of models that one worker serves. ``generation`` is one of them, ``succession`` their order, ``rings`` what
they count. The process and its channel are ``workers``'.
"""

from skerry_agent.serving.generation import Generation
from skerry_agent.serving.rings import SHADOW_RING
from skerry_agent.serving.succession import Serving

__all__ = ["SHADOW_RING", "Generation", "Serving"]
