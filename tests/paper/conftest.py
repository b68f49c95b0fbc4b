"""The fixtures of this folder: a run small enough for a test."""

from tests.shared.small_run import config, data, eager, text  # noqa: F401
