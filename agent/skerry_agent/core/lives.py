"""Two lives of one outbox: what becomes of a record that the server disputes after the file was put back from a backup.

Only between two starts a file can have been put back. What waited at the first of them is the same in both lives, under the same
seqs; what was made since the last start is this life's alone; between the two nobody can say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from skerry_contract.wire import Range

Life = Literal["shared", "unsure", "own"]
Fate = Literal["move", "counted", "give up"]


@dataclass(frozen=True, slots=True)
class Starts:
    """How far an epoch was at the first start at which something of it waited, and at the last one."""

    first: int = 0
    last: int = 0

    def life(self, seq: int, replaces: Sequence[Range]) -> Life:
        """Which life made a record. What merged is all of one life, so its oldest part tells.

        >>> Starts(16, 20).life(25, [(17, 18)])
        'unsure'
        """
        oldest = replaces[0][0] if replaces else seq
        return "shared" if oldest <= self.first else "unsure" if oldest <= self.last else "own"

    def fate(self, seq: int, replaces: Sequence[Range], held: Sequence[Range]) -> Fate:
        """What becomes of a disputed window. ``held``: seqs of its epoch that the server has, disjoint.

        A window that was not merged, or whose parts the server has nothing of, is sent again in the new epoch. Merged of what both
        lives have, it is counted already if the server has all of that; where it has some, the rest cannot be told apart.

        >>> Starts(16, 16).fate(20, [(1, 8)], [(1, 16)]), Starts(16, 16).fate(20, [(9, 16)], [(1, 12)])
        ('counted', 'give up')
        """
        life = self.life(seq, replaces)
        if not replaces or life == "own":
            return "move"
        # What was merged and then merged again stands there too, and has no content of its own.
        upto = self.first if life == "shared" else self.last
        parts = [(low, min(high, upto)) for low, high in replaces if low <= upto]
        there = sum(max(0, min(high, to) - max(low, at) + 1) for low, high in parts for at, to in held)
        if there == 0:
            return "move"
        return "counted" if life == "shared" and there == sum(high - low + 1 for low, high in parts) else "give up"
