"""Rewriting a traced graph: inserting the roundings that a policy asks for."""
