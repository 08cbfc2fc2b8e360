"""Bundles on disk, and the pointer file that says which of them run.

``bundles`` is the folders, each by the digest of its bundle, ``files`` what is in one, ``pointers`` the file that names per model what
is confirmed, ``collecting`` makes room, ``running`` decides by all of them what a boot starts and what answers.
"""

from skerry_agent.slots.bundles import PARTS, STAGED_MANIFEST
from skerry_agent.slots.pointers import Slot, read_pointers
from skerry_agent.slots.running import Slots

__all__ = ["PARTS", "STAGED_MANIFEST", "Slot", "Slots", "read_pointers"]
