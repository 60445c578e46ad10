"Hypothesis draws the same examples in every run, so that a change alone turns a check red; HYPOTHESIS_PROFILE=default draws new ones."

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
