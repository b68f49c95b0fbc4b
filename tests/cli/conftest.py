"""Fixtures of the tests of this folder: a run small enough for a test."""

import torchao  # noqa: F401  (it prints when transformers first imports it, and would be part of a command's output)

from tests.shared.small_run import config, data, eager, text  # noqa: F401
