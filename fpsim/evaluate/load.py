"""Models from a Hugging Face checkpoint, or from the user's own Python script: ``path/to/script.py:build``.

The script's ``build`` returns a `torch.nn.Module` from tokens, int64 of shape (batch, context), to logits of shape
(batch, context, vocabulary) or to an object with ``.logits``; it may take ``vocabulary`` and ``context``. Tokens are
the bytes of a text, unless the script has a function ``tokenize`` from a string to integers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.showing import counted, why_unreadable
from fpsim.suggestions import did_you_mean

#: The vocabulary of tokens that are bytes.
BYTES = 256
#: Tokens per window, where neither the caller nor the script gives a number.
CONTEXT = 128


@dataclass(frozen=True, eq=False)
class Script:
    """The model of a script.

    Attributes:
        network: the module, in evaluation mode, on the CPU unless the script put it elsewhere.
        context: tokens per window: those that the caller asked for, or else those of the script or its module.
        tokenize: from a string to tokens; None where tokens are bytes.
    """

    network: nn.Module
    context: int
    tokenize: Callable[[str], Sequence[int]] | None


def load_checkpoint(folder: Path, dtype: torch.dtype) -> Any:
    """The causal language model of the Hugging Face checkpoint in ``folder``, in evaluation mode and without a cache.

    Nothing is downloaded.

    Args:
        dtype: the dtype of its weights.

    Raises:
        FileNotFoundError: ``folder`` holds no checkpoint.
        ValueError: its files are broken, or lack weights of the model.
        ModuleNotFoundError: transformers is not installed.
    """
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no Hugging Face checkpoint at {folder}: name the folder with config.json, as save_pretrained writes it"
        )
    try:
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "transformers is not installed; checkpoints need it: pip install 'fpsim-torch[paper]'", name="transformers"
        ) from error
    with errors_of_checkpoint(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    model, told = loaded
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(
            f"the checkpoint at {folder} lacks {counted(len(missing), 'weight')} of its model: {', '.join(missing[:5])}"
        )
    model.config.use_cache = False
    return model.eval()


@contextmanager
def errors_of_checkpoint(folder: Path) -> Iterator[None]:
    """A block in which transformers reads files of ``folder``, for which it has errors of many kinds.

    Raises:
        ValueError: it raised an error. The message has one line.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the checkpoint at {folder} cannot be read: {type(error).__name__}: {reason}") from error


def is_script(name: str) -> bool:
    """Whether ``name`` names a script rather than a folder.

    >>> is_script("models/mine.py:build"), is_script("models/mine")
    (True, False)
    """
    return ".py:" in name or name.endswith(".py")


def load_script(script: str, *, context: int | None = None, weights: Path | None = None, seed: int = 0) -> Script:
    """The model of ``path/to/script.py:function``; the script is executed once per process and content.

    Args:
        script: the file and, after a colon, the function in it that builds the module. The function is called with
            ``vocabulary`` (256, unless the script has ``tokenize``) and ``context``, if it has these parameters.
        context: tokens per window; None is the default of the function's own parameter, or else the positions of the
            module (``.config.max_position_embeddings``, at most 1024), or else 128.
        weights: a file with the state dict of the module, as ``torch.save(module.state_dict(), file)`` writes it; read
            with ``weights_only=True``, so that it can hold tensors only. None: the weights that the function makes.
        seed: the seed of torch's generator while the function runs; its state is restored afterwards.

    Raises:
        FileNotFoundError: no such script, or no such weights.
        ValueError: no such function (the message lists those of the script), a function that needs other arguments, a
            result that is not a module or is a compiled one, weights that are not a state dict or do not fit, or an
            error of the script's own (the message names its line).
    """
    module, build = script_function(script)
    tokenize = getattr(module, "tokenize", None)
    own = inspect.signature(build).parameters
    default = own["context"].default if "context" in own else None
    given = (default if isinstance(default, int) else CONTEXT) if context is None else context
    network = built(script, build, {"context": given, **({} if tokenize else {"vocabulary": BYTES})}, seed)
    if weights is not None:
        _load_weights(script, network, weights)
    if hasattr(network, "config") and hasattr(network.config, "use_cache"):
        network.config.use_cache = False
    if context is None and "context" not in own:
        limit = positions(network)
        given = min(limit, 1024) if limit else CONTEXT
    return Script(network.eval(), given, tokenize)


def positions(network: nn.Module) -> int | None:
    """The number of positions of a Hugging Face model; None if its configuration has none, or for another module."""
    config: Any = getattr(network, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


def script_function(script: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The module and the function that ``path/to/script.py:function`` names.

    The script is executed once per process and content.

    Raises:
        FileNotFoundError: no such script.
        ValueError: no function is named, the script has no such function (the message lists those of the script), or
            the script raises an error (the message names its line).
    """
    path, name = script_file(script), script.rpartition(":")[2]
    module = _executed(path)
    found = getattr(module, name, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{path} has no function {name!r}{did_you_mean(name, own)}: it has {', '.join(own) or 'none'}")
    return module, found


def script_file(script: str) -> Path:
    """The file of ``path/to/script.py:function``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no function is named.
    """
    path, colon, name = script.rpartition(":")
    if not colon or not name:
        raise ValueError(f"{script!r} names no function: write path/to/script.py:function, {script.rstrip(':')}:build")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no script at {path} (working directory {Path.cwd()}), asked for as {script!r}")
    return Path(path)


def _executed(place: Path) -> ModuleType:
    """The script at ``place`` as a module with a name of its own: Dynamo looks up the modules of functions by name."""
    identity = hashlib.sha256(str(place.resolve()).encode() + place.read_bytes()).hexdigest()
    name = f"fpsim_user_{place.stem}_{identity[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs: its data classes look their own module up
        try:
            with errors_of_script(str(place), "when it is executed"):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@contextmanager
def errors_of_script(script: str, when: str) -> Iterator[None]:
    """A block that runs the code of ``script`` (a path, or ``path:function``).

    Raises:
        ValueError: the code raised an error. The message has one line, and names the error and the line of the script.
    """
    try:
        yield
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        path = Path(script.rpartition(":")[0] if ".py:" in script else script).resolve()
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path]
        text = " ".join(str(error).split())[:300]
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == path:
            own, text = [error.lineno], error.msg
        place = f", line {own[-1]}" if own else ""
        raise ValueError(f"{script} fails {when}{place}: {type(error).__name__}{': ' if text else ''}{text}") from error


def built(script: str, build: Callable[..., Any], known: dict[str, int], seed: int) -> nn.Module:
    """The module that ``build`` of ``script`` returns.

    Args:
        known: the arguments that ``build`` may take; it is called with those that it has parameters for.
        seed: the seed of torch's generator while it runs.

    Raises:
        ValueError: ``build`` needs other arguments, raises an error, or returns no module or a compiled one.
    """
    parameters = inspect.signature(build).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind not in variadic and name not in known:
            why = " where the script has its own tokenize" if name == "vocabulary" else ""
            raise ValueError(
                f"{script} needs {name!r}, and is given only {' and '.join(sorted(known))}{why}: give it a default"
            )
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with errors_of_script(script, "when it builds its module"):
            network = build(**{name: value for name, value in known.items() if takes_all or name in parameters})
    if not isinstance(network, nn.Module):
        raise ValueError(f"{script} must return a torch.nn.Module, got {type(network).__name__}")
    if hasattr(network, "_orig_mod"):
        raise ValueError(
            f"{script} returns a compiled module, in which formats cannot be simulated: return it uncompiled"
        )
    return network


def _load_weights(script: str, network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path} (working directory {Path.cwd()})")
    remedy = "write it with torch.save(module.state_dict(), file)"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a state dict: {remedy} ({why_unreadable(error)})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        held = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{path} is not a state dict, it holds {held[:200]}: {remedy}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        found = " ".join(str(error).split())
        raise ValueError(f"the weights in {path} do not fit the module of {script}: {found[:500]}") from None
