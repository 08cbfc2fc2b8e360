"""What all tests share: hypothesis without deadlines (tests share two cores with real fleets) and a thorough profile."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("usual", deadline=None, print_blob=True)
settings.register_profile("thorough", deadline=None, print_blob=True, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))
