"""How post-training quantization changes generated text, against temperature, top-k and length.

The question is that of *Understanding the Impact of Post-Training Quantization on Large Language Models* (Roy, arXiv
2309.05210): NF4, FP4 (with quantized scales too), INT8 and bfloat16. A small Llama is trained on bytes of text. The
weights of its linear layers, but not of its head, are rounded once. Each rounded model then writes. The random numbers
are the same in every format, so that formats are compared in pairs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from fpsim.training.parameters import round_parameters

from . import require
from .choices import check_choice
from .config import RunConfig, run_key
from .data import Data, batches, load, validation_batches
from .figures import colours
from .models import LanguageModel, ModelConfig
from .storage import read_results, write_results
from .trainer import Trainer
from .verdicts import rules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The formats by label: the cast of the weights, or None for those of the training.
FORMATS: dict[str, str | None] = {
    "fp32": None,
    "bf16": "bf16",
    "int8": "int8/row",
    "nf4": "nf4/group:64",
    "nf4, double": "nf4/group:64:double",
    "fp4": "fp4_bnb/group:64",
    "fp4, double": "fp4_bnb/group:64:double",
}
#: The measures of `measure`, with the direction that is better.
MEASURES = {"judged_loss": "lower", "known_words": "higher", "distinct": "nearer to the text's own"}


@dataclass(frozen=True)
class Sampling:
    """How text is drawn.

    Attributes:
        temperature: logits are divided by it.
        top_k: only the k most likely tokens are drawn.
        length: tokens to write after the prompt.
    """

    temperature: float = 0.8
    top_k: int = 50
    length: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")
        for name in ("top_k", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


#: The settings of the study: one of three values changes at a time.
SAMPLINGS = (
    *(Sampling(temperature=value) for value in (0.2, 0.5, 0.8, 1.0, 1.5)),
    *(Sampling(top_k=value) for value in (2, 10, 256)),
    *(Sampling(length=value) for value in (32, 256)),
)


@dataclass(frozen=True)
class Size:
    """The model and the numbers of a study: seeds of training, and texts that each model writes in each setting."""

    config: RunConfig
    seeds: int
    texts: int


_TINY = RunConfig(model=ModelConfig(hidden=64, mlp=176), steps=400, batch=16, warmup=40, learning_rate=5e-3)
#: The sizes: ``quick`` takes minutes on 2 cores, ``full`` an hour or more.
SIZES = {
    "quick": Size(_TINY, seeds=2, texts=16),
    "full": Size(replace(_TINY, model=ModelConfig(layers=4, hidden=256, heads=8, mlp=704), steps=4000), 5, 64),
}


@dataclass(frozen=True)
class Quality:
    """The quality of the texts that one model wrote.

    Attributes:
        format, seed, sampling: the model and the setting.
        loss: of the rounded model on held-out text, nats per token.
        judged_loss: nats per token that a judge gives the texts: an unrounded model, trained from another seed.
        known_words: share of the written words that occur in the training text.
        distinct: share of different ones among all sequences of four tokens in a text.
    """

    format: str
    seed: int
    sampling: Sampling
    loss: float
    judged_loss: float
    known_words: float
    distinct: float


def generate(model: LanguageModel, prompts: Tensor, sampling: Sampling, *, context: int, seed: int) -> Tensor:
    """Continue ``prompts`` token by token, with the Gumbel-max trick: noise depends on ``seed`` and the step alone.

    Args:
        prompts: int64, shape (texts, tokens).
        context: the most tokens that the model reads.

    Returns:
        The written tokens, int64, shape (texts, length).
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prompts
    with torch.no_grad():
        for _ in range(sampling.length):
            logits = model.logits(tokens[:, -context:])[:, -1].double() / sampling.temperature
            lowest = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
            uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
            drawn = torch.where(logits >= lowest, logits - torch.log(-torch.log(uniform)), -math.inf)
            tokens = torch.cat([tokens, drawn.argmax(1, keepdim=True)], 1)
    return tokens[:, prompts.shape[1] :]


def rounded(model: LanguageModel, cast: str | None) -> LanguageModel:
    """A copy of ``model`` with the weights of its linear layers rounded, without those of the head.

    Raises:
        ValueError: the model has no linear layer beside its head.
    """
    copied = copy.deepcopy(model)
    if cast is not None:
        names = [
            f"{name}.weight"
            for name, module in copied.named_modules()
            if isinstance(module, nn.Linear) and not name.endswith("head")
        ]
        round_parameters(copied, dict.fromkeys(names, cast))
    return copied


def words(tokens: Sequence[int]) -> list[str]:
    """The words in bytes of UTF-8 text: runs of letters, in lower case. The first and the last may be cut, and go.

    >>> words(list(b"e; To be, or no"))
    ['to', 'be', 'or']
    """
    text = bytes(token for token in tokens if token < 256).decode(errors="replace")
    found = "".join(letter.lower() if letter.isalpha() else " " for letter in text)
    parts = found.split(" ")
    return [part for part in parts[1:-1] if part]


def distinct_share(tokens: Sequence[int], length: int = 4) -> float:
    """The share of different sequences among all sequences of ``length`` tokens; NaN for fewer tokens."""
    sequences = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return len(set(sequences)) / len(sequences) if sequences else math.nan


def study(
    size: Size, formats: Iterable[str], folder: Path, *, tell: Callable[[str], object] = lambda line: None
) -> list[Quality]:
    """Train, round, write and judge: everything that ``folder`` lacks.

    Args:
        tell: called with a line of text before each piece of work.

    Returns:
        All qualities in ``folder`` of the models, the judge and the number of texts of ``size``.

    Raises:
        ValueError: an unknown format, or numbers of another version in the folder.
    """
    formats = list(formats)
    for name in formats:
        check_choice("format", name, FORMATS)
    path = folder / "qualities.json"
    kept = read_results(path, "qualities")
    data = load(size.config.data, context=size.config.model.context)
    known = frozenset(words(data.train.tolist()))
    configs = [replace(size.config, seed=seed) for seed in range(size.seeds + 1)]
    keys = [run_key(config) for config in configs]

    @cache
    def model(seed: int) -> LanguageModel:
        tell(f"training the {'judge' if seed == size.seeds else 'model'} of seed {seed}")
        return train(configs[seed], data)

    found: list[Quality] = []
    for seed in range(size.seeds):
        prefix = f"{keys[seed]}/{keys[-1]}/{size.texts}/"  # the judge has the seed after the last
        for name in formats:
            if prefix + name not in kept:
                writer, judge = model(seed), model(size.seeds)
                tell(f"seed {seed}: texts of the weights in {name}")
                qualities = _qualities(name, seed, writer, judge, size, data, known)
                kept[prefix + name] = [asdict(quality) for quality in qualities]
                write_results(path, "qualities", kept)
        found += [_quality(fields) for key, group in kept.items() if key.startswith(prefix) for fields in group]
    return found


def _quality(fields: Mapping[str, Any]) -> Quality:
    return Quality(**{**fields, "sampling": Sampling(**fields["sampling"])})


def train(config: RunConfig, data: Data) -> LanguageModel:
    """The model after the run of ``config``."""
    trainer = Trainer(config, None)
    stream = batches(data.train, seed=config.seed, batch=config.batch, context=config.model.context)
    for index, batch in enumerate(islice(stream, config.steps)):
        trainer.step(index, batch, [batch], None)
    return LanguageModel(trainer.model.network)


def _qualities(
    name: str, seed: int, model: LanguageModel, judge: LanguageModel, size: Size, data: Data, known: frozenset[str]
) -> list[Quality]:
    context = size.config.model.context
    writer = rounded(model, FORMATS[name])
    held_out = validation_batches(data.validation, count=4, batch=size.texts, context=context)
    with torch.no_grad():
        loss = math.fsum(float(writer(*batch)) for batch in held_out) / 4
    prompts = held_out[0][0][:, : context // 4]
    found = []
    for number, sampling in enumerate(SAMPLINGS):
        texts = generate(writer, prompts, sampling, context=context, seed=1000 * seed + number)
        found.append(Quality(name, seed, sampling, loss, **measure(texts, prompts, judge, context, known)))
    return found


def measure(
    texts: Tensor, prompts: Tensor, judge: LanguageModel, context: int, known: frozenset[str]
) -> dict[str, float]:
    """The measures of `Quality` for ``texts``, int64 of shape (texts, tokens), written after ``prompts``."""
    whole = torch.cat([prompts, texts], 1)
    losses = []
    with torch.no_grad():
        for start in range(prompts.shape[1], whole.shape[1]):
            window = whole[:, max(0, start - context) : start]
            logits = judge.logits(window)[:, -1]
            losses.append(nn.functional.cross_entropy(logits, whole[:, start]))
    written = [word for text in texts.tolist() for word in words(text)]
    return {
        "judged_loss": float(torch.stack(losses).mean()),
        "known_words": sum(word in known for word in written) / len(written) if written else math.nan,
        "distinct": float(np.mean([distinct_share(text) for text in texts.tolist()])),
    }


# -- the result --------------------------------------------------------------------------------------------------------


def differences(qualities: Sequence[Quality], name: str, measure: str) -> dict[Sampling, tuple[float, float]]:
    """For each setting the mean difference to ``fp32`` over seeds, and half its interval (Student, registered level).

    Half an interval is NaN for a single seed.
    """
    values: Mapping[tuple[str, int, Sampling], float] = {
        (each.format, each.seed, each.sampling): getattr(each, measure) for each in qualities
    }
    level = float(rules().prediction["level"])
    found = {}
    for sampling in SAMPLINGS:
        pairs = [
            (value, values["fp32", seed, sampling])
            for (other, seed, own), value in values.items()
            if (other, own) == (name, sampling) and ("fp32", seed, sampling) in values
        ]
        if pairs:
            gaps = np.array([value - base for value, base in pairs])
            half = math.nan
            if len(gaps) > 1:
                half = float(stats.t.ppf((1 + level) / 2, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps)))
            found[sampling] = (float(gaps.mean()), half)
    return found


def markdown(qualities: Sequence[Quality]) -> str:
    """One row per format and setting: differences to fp32 of the three measures, with intervals over seeds."""
    rows = [
        f"| format | temperature | top-k | length | {' | '.join(MEASURES)} |",
        "|---|---|---|---|" + "---|" * len(MEASURES),
    ]
    for name in dict.fromkeys(each.format for each in qualities):
        by_measure = {measure: differences(qualities, name, measure) for measure in MEASURES}
        for sampling in by_measure["judged_loss"]:
            gaps = [by_measure[measure][sampling] for measure in MEASURES]
            cells = [name, f"{sampling.temperature:g}", str(sampling.top_k), str(sampling.length)]
            cells += [f"{gap:+.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "") for gap, half in gaps]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def figure(qualities: Sequence[Quality]) -> Figure:
    """The three measures against temperature, top-k and length, a line per format, means over seeds."""
    drawn = require("matplotlib.figure").Figure(figsize=(11, 8), dpi=110, layout="constrained")
    panels = drawn.subplots(len(MEASURES), 3, squeeze=False, sharey="row")
    names = list(dict.fromkeys(each.format for each in qualities))
    paint, default = colours(names), Sampling()
    for row, measure in zip(panels, MEASURES, strict=True):
        for axes, field in zip(row, ("temperature", "top_k", "length"), strict=True):
            chosen = [each for each in SAMPLINGS if replace(each, **{field: getattr(default, field)}) == default]
            chosen.sort(key=lambda each, field=field: getattr(each, field))  # type: ignore[misc]
            for name in names:
                found: dict[Any, list[float]] = {each: [] for each in chosen}
                for quality in qualities:
                    if quality.format == name and quality.sampling in found:
                        found[quality.sampling].append(getattr(quality, measure))
                points = [(getattr(each, field), np.mean(values)) for each, values in found.items() if values]
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=paint[name], label=name)
            axes.set(xlabel=field.replace("_", "-"), xscale="linear" if field == "temperature" else "log")
            axes.grid(alpha=0.25)
        row[0].set_ylabel(measure.replace("_", " "))
    panels[0][-1].legend(fontsize=7)
    return drawn
