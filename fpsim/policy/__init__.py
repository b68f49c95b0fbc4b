"""What is rounded where: policies, and the globs by which they name modules."""

from fpsim.policy.policy import Policy

__all__ = ["Policy"]
