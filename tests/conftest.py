"""Settings that every test runs under."""

import os

import hypothesis

# More cases on demand: HYPOTHESIS_PROFILE=long. No deadline: the first example compiles.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30)
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
