"""Policies state which operations are rounded, and how; globs name the modules to which a rule applies."""

from fpsim.policy.policy import Policy

__all__ = ["Policy"]
