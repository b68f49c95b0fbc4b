"""Hypothesis without a deadline: fractions are slow, and the machine may be busy."""

from hypothesis import settings

settings.register_profile("reference", deadline=None)
settings.load_profile("reference")
