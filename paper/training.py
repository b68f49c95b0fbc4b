"""One training run as a pure function of a frozen configuration and the data: its records, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

from .checkpoint import Checkpoint
from .compiled_loss import Compile
from .config import RunConfig, check_single_process, run_key, to_dict
from .data import Data, batches, check_vocabulary, load, validation_batches
from .parallel import Parallel, ParallelTrainer
from .record import Record
from .trainer import Batch, Trainer


def records(
    config: RunConfig,
    data: Data | None = None,
    *,
    compile: Compile | None = None,
    checkpoint: Checkpoint | None = None,
    parallel: Parallel | None = None,
    at_start: Callable[[Trainer], object] | None = None,
    at_end: Callable[[Trainer, Sequence[Batch]], object] | None = None,
) -> Iterator[Record]:
    """Train step by step, and yield one `Record` per step: a generator, so that runs can be interleaved.

    The records depend on the configuration and the data alone: same bits, on one machine, with one number of threads
    (and of processes). Non-finite losses are recorded like any other, and end the run only if ``stop_nonfinite`` asks
    for it.

    Args:
        data: tokens on the CPU, both parts longer than ``config.model.context``; None loads ``config.data``.
        compile: from the module and ``config.options`` to the loss; None means
            `fpsim.paper.compiled_loss.compile_loss`.
        checkpoint: where to keep the state. If the file exists, the records in it are yielded first and the run
            continues after them: the same bits as without interruption.
        parallel: how the processes of ``torchrun`` share the work; None is a single process.
        at_start: called before the first step, with the trainer, which holds the weights of the newest record.
        at_end: called after the last step, with the trainer and the validation batches.

    Raises:
        ValueError: a checkpoint of another run, tokens that the model lacks, a batch that the processes cannot share,
            a recipe that averages gradients of several processes in a single one.
    """
    data = load(config.data, context=config.model.context) if data is None else data
    check_vocabulary(data, config.model.vocabulary)
    if parallel is None or parallel.world == 1:
        check_single_process(config)
        trainer = Trainer(config, compile)
    else:
        trainer = ParallelTrainer(config, compile, parallel)
    key = run_key(config) if checkpoint else ""
    history: list[Record] = []
    if checkpoint and (found := checkpoint.read(key)):
        history, saved = found
        trainer.resume(len(history), saved, saved["precision"])
    if at_start is not None:
        at_start(trainer)
    yield from history
    shape = {"batch": config.batch, "context": config.model.context}
    held_out = [
        _to(batch, config.device)
        for batch in validation_batches(data.validation, count=config.validation_batches, **shape)
    ]
    shape["batch"] *= config.accumulate
    stream = batches(data.train, seed=config.seed, start=len(history), **shape)
    written = time.monotonic()
    for index in range(len(history), config.steps):
        if _is_lost(history, config):
            break
        smoothed = history[-1].smoothed_loss if history else None
        history.append(trainer.step(index, _to(next(stream), config.device), held_out, smoothed))
        yield history[-1]
        is_due = time.monotonic() - written >= checkpoint.seconds if checkpoint else False
        is_last = checkpoint is not None and not checkpoint.is_own and index + 1 == config.steps
        if checkpoint and (state := trainer.state_if(is_due or is_last)):
            state = {**state, "precision": trainer.precision_state(), "config": to_dict(config)}
            checkpoint.write(key, history, state)
            written = time.monotonic()
    if at_end is not None:
        at_end(trainer, held_out)


def run(
    config: RunConfig,
    data: Data | None = None,
    *,
    compile: Compile | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Record]:
    """The whole run: all of `records`."""
    return list(records(config, data, compile=compile, checkpoint=checkpoint))


def _is_lost(history: Sequence[Record], config: RunConfig) -> bool:
    """Whether the last ``config.stop_nonfinite`` steps had no finite loss."""
    last = history[-config.stop_nonfinite :] if config.stop_nonfinite else []
    return 0 < config.stop_nonfinite == len(last) and not any(math.isfinite(record.loss) for record in last)


def _to(batch: Batch, device: str) -> Batch:
    inputs, targets = batch
    return inputs.to(device), targets.to(device)
