"""Rewriting a traced graph: what is rounded where, as a policy says."""
