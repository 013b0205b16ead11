"""Settings that all tests share."""

import os

from hypothesis import settings

# By day every run tries the same examples, so that a failure is the change's; `make nightly` tries
# new ones, and many more.
settings.register_profile("day", derandomize=True, deadline=None)
settings.register_profile("night", deadline=None, print_blob=True)
settings.load_profile("night" if "EXAMPLES" in os.environ else "day")
