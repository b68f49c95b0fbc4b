"""Hypothesis for all tests: on a busy machine a slow example says nothing."""

from hypothesis import HealthCheck, settings

settings.register_profile("fpsim", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fpsim")
