"""The device's store: one SQLite file with the outbox, the durable state and how far each recorder ring is committed.

``database`` is the file, ``outbox`` the records in it, ``compaction`` keeps them below their bound, ``opening`` copes with what a
start finds. Wall time and randomness are arguments.
"""

from skerry_agent.store.compaction import Store
from skerry_agent.store.opening import Opened, open_store
from skerry_agent.store.outbox import Acknowledged, Entry, RecordDamaged, RingAt

__all__ = ["Acknowledged", "Entry", "Opened", "RecordDamaged", "RingAt", "Store", "open_store"]
