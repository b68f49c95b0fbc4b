"""EleutherAI's lm-eval with a model under a policy. It needs ``pip install lm-eval accelerate``."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fpsim.evaluate.batches import check_model
from fpsim.evaluate.policies import PolicyLike, parse_policy
from fpsim.evaluate.running import check_backend


def harness_model(
    model: nn.Module, tokenizer: Any, policy: PolicyLike, *, backend: str = "fpsim_eager", **options: Any
) -> Any:
    """A model for ``lm_eval.simple_evaluate(model=...)`` that runs ``model`` under ``policy``.

    Args:
        model: a causal language model of transformers, uncompiled and in evaluation mode. It stays as it is: a copy
            that shares its parameters is compiled. It is compiled again for new lengths of texts, a few times.
        tokenizer: its tokenizer.
        policy: as `fpsim.evaluate.policies.parse_policy` reads it; None rounds nothing.
        backend: ``fpsim_eager`` or ``fpsim``.
        options: of ``lm_eval.models.huggingface.HFLM``, such as ``batch_size``.

    Returns:
        An ``HFLM``.

    Raises:
        ModuleNotFoundError: lm-eval or accelerate is not installed.
        ValueError: the model is compiled or in training mode, or the policy or the backend is unknown.
    """
    check_model(model)
    check_backend(backend)
    parsed = parse_policy(policy)
    try:
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install lm-eval accelerate", name=error.name
        ) from error
    rounded = copy.copy(model)
    if parsed is not None:
        rounded.compile(backend=backend, options={"policy": parsed})
    device = next(model.parameters()).device
    return HFLM(pretrained=rounded, tokenizer=tokenizer, **{"device": str(device), **options})
