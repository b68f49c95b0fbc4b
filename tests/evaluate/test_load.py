"""``fpsim sharpness path/to/script.py:build`` gives the numbers of plain numpy on the same table of logits."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fpsim.cli.main import app
from fpsim.evaluate.load import load_script
from fpsim.evaluate.logit_sharpness import measure_script

TEXT = "It was the best of times, it was the worst of times – naïve."
CONTEXT = 8

#: A language model that looks at one token: its logits are a row of its only weight.
SCRIPT = """
from __future__ import annotations
from dataclasses import dataclass
from types import SimpleNamespace
import torch

@dataclass
class Sizes:
    vocabulary: int = 256

class Bigram(torch.nn.Module):
    def __init__(self, vocabulary, wrapped=False):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(vocabulary, vocabulary, dtype=torch.float64))
        self.wrapped = wrapped

    def forward(self, tokens):
        assert not self.training
        logits = torch.nn.functional.one_hot(tokens, len(self.table)).to(self.table.dtype) @ self.table
        return SimpleNamespace(logits=logits) if self.wrapped else logits

def build(vocabulary, context=8):
    return Bigram(vocabulary)

def bare(): return Bigram(Sizes().vocabulary, wrapped=True)
def small(): return Lookup(256, 100)
def late(context): return Bigram(256)
def hungry(vocabulary, width): return Bigram(vocabulary)
def nothing(): return None
def pooled(): return Pooled()
def told(): return Told()
def looked_up(): return Lookup(100, 256)
def compiled(): return torch.compile(Bigram(256), backend="eager")

class Pooled(torch.nn.Module):
    def forward(self, tokens): return tokens.double().mean(1, keepdim=True)

class Told(torch.nn.Module):
    def forward(self, tokens): return "logits"

class Lookup(torch.nn.Module):
    def __init__(self, words, vocabulary):
        super().__init__()
        self.embedding = torch.nn.Embedding(words, vocabulary)
    def forward(self, tokens): return self.embedding(tokens)
"""

TOKENIZER = """
def tokenize(text):
    return [len(word) for word in text.split()]

def own(): return Bigram(10)
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(3).normal(0, 2, (256, 256)).astype(np.float32).astype(np.float64)


@pytest.fixture
def weights(tmp_path, table) -> Path:
    path = tmp_path / "weights.pt"
    torch.save({"table": torch.from_numpy(table)}, path)
    return path


def cross_entropy(z: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(z, axis=1) - z[np.arange(len(z)), targets]


def judged(table: np.ndarray, tokens: list[int], epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Sharpness and loss of every predicted token: the loss at the box's worst corner, less the loss."""
    z, targets = table[tokens[:-1]], np.array(tokens[1:])
    corner = z + epsilon * (np.abs(z) + 1)
    here = np.arange(len(z)), targets
    corner[here] = z[here] - epsilon * (np.abs(z[here]) + 1)
    loss = cross_entropy(z, targets)
    return 100 * (cross_entropy(corner, targets) - loss) / (1 + loss), loss


def length_of_gradient(table: np.ndarray, tokens: list[int]) -> float:
    gradient = np.zeros_like(table)
    for token, target in itertools.pairwise(tokens):
        gradient[token] += np.exp(table[token] - np.logaddexp.reduce(table[token]))
        gradient[token, target] -= 1
    return float(np.linalg.norm(gradient / (len(tokens) - 1)))


def test_a_script_is_measured_on_the_bytes_of_a_text(script, text, weights, table):
    tokens = list(TEXT.encode())
    for function, context in (("build", None), ("bare", CONTEXT)):
        report = measure_script(f"{script}:{function}", text, weights=weights, context=context)
        (row,) = report.rows
        assert (report.context, report.windows) == (CONTEXT, math.ceil((len(tokens) - 1) / CONTEXT))
        for epsilon, every in row.every.items():
            sharpness, loss = judged(table, tokens, epsilon)
            assert (every.tokens, every.nonfinite) == (len(tokens) - 1, 0)
            assert every.sharpness == pytest.approx(sharpness.mean(), rel=1e-10)
            assert every.stderr == pytest.approx(sharpness.std(ddof=1) / len(sharpness) ** 0.5, rel=1e-10)
            assert every.max_sharpness == pytest.approx(sharpness.max(), rel=1e-10)
            assert every.loss == pytest.approx(loss.mean(), rel=1e-12)
            assert every.max_abs_logit == np.abs(table[tokens[:-1]]).max()
            ends = [*range(CONTEXT - 1, len(loss) - 1, CONTEXT), len(loss) - 1]
            assert row.last[epsilon].tokens == len(ends)
            assert row.last[epsilon].sharpness == pytest.approx(sharpness[ends].mean(), rel=1e-10)
        assert row.gradient_norm == pytest.approx(length_of_gradient(table, tokens), rel=1e-12)


def test_formats_round_the_weights_of_a_script(script, text, weights, table):
    report = measure_script(
        f"{script}:build", text, weights=weights, formats=["e4m3fn"], epsilons=[1e-3], gradients=False
    )
    rounded = torch.from_numpy(table).float().to(torch.float8_e4m3fn).double().numpy()
    sharpness, loss = judged(rounded, list(TEXT.encode()), 1e-3)
    assert [row.format for row in report.rows] == ["none", "e4m3fn"]
    assert report.rows[1].every[1e-3].loss == pytest.approx(loss.mean(), rel=1e-12)
    assert report.rows[1].every[1e-3].sharpness == pytest.approx(sharpness.mean(), rel=1e-10)


def test_a_script_may_tokenize(script, text):
    script.write_text(SCRIPT + TOKENIZER)
    (row,) = measure_script(f"{script}:own", text, context=CONTEXT).rows
    table = load_script(f"{script}:own").network.table.detach().numpy()
    tokens = [len(word) for word in TEXT.split()]
    sharpness, _ = judged(table, tokens, 5e-4)
    assert row.every[5e-4].tokens == len(tokens) - 1
    assert row.every[5e-4].sharpness == pytest.approx(sharpness.mean(), rel=1e-10)
    with pytest.raises(ValueError, match=r"needs 'vocabulary', .* where the script has its own tokenize"):
        measure_script(f"{script}:build", text)
    for made in ("['a', 'b']", "[1.5, 2.5]", "[-1, 2]", "3"):
        script.write_text(SCRIPT + f"\ndef tokenize(text): return {made}\n")
        with pytest.raises(ValueError, match=r"tokenize must return a sequence of integers from 0 on, got "):
            measure_script(f"{script}:bare", text)
    script.write_text(SCRIPT + "\ndef tokenize(text): return []\n")
    with pytest.raises(ValueError, match="holds 0 tokens"):
        measure_script(f"{script}:bare", text)


def test_who_says_how_long_a_window_is(script):
    assert load_script(f"{script}:build").context == CONTEXT
    assert load_script(f"{script}:build", context=3).context == 3
    assert load_script(f"{script}:bare").context == load_script(f"{script}:late").context == 128


def test_models_of_transformers_bring_their_own_length(tmp_path, text):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "llama.py"
    path.write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "def build(vocabulary):\n"
        "    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1,\n"
        "        num_attention_heads=2, intermediate_size=16, max_position_embeddings=16))\n"
    )
    found = load_script(f"{path}:build")
    assert isinstance(found.network, transformers.LlamaForCausalLM)
    assert (found.context, found.network.config.use_cache, found.network.training) == (16, False, False)
    report = measure_script(f"{path}:build", text, gradients=False)
    assert report.rows[0].every[5e-4].tokens == len(TEXT.encode()) - 1
    with pytest.raises(ValueError, match=r"context must be from 1 to 16, the model's positions, got 17"):
        measure_script(f"{path}:build", text, context=17)


def test_weights_are_drawn_from_a_seed_and_leave_the_generator_alone(script):
    before = torch.random.get_rng_state()
    one, same, other = (load_script(f"{script}:build", seed=seed).network.table for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.py:build", "no script at .*none.py"),
        ("mine.py", r"names no function: write path/to/script.py:function, .*mine.py:build"),
        ("mine.py:", r"names no function: write path/to/script.py:function, .*mine.py:build"),
        ("mine.py:biuld", r"has no function 'biuld' \(did you mean 'build'\?\): it has dataclass, build, bare, "),
        ("mine.py:hungry", "needs 'width', and is given only context and vocabulary: give it a default"),
        ("mine.py:nothing", r"mine.py:nothing must return a torch.nn.Module, got NoneType"),
        ("mine.py:compiled", "returns a compiled module"),
        ("mine.py:told", r"must return logits, or an object with .logits, got str"),
        ("mine.py:pooled", r"shape \(1, 62\) to .* shape \(1, 62, vocabulary\), got torch.float64 of shape \(1, 1\)"),
        ("mine.py:looked_up", "does not take tokens up to 226 in windows of 62: let it take vocabulary"),
        ("mine.py:small", "has logits of 100 words, and the text has token 226: let it"),
    ],
)
def test_scripts_that_cannot_be_used_say_why(script, text, name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        measure_script(str(script.parent / name), text)


def test_texts_and_weights_that_cannot_be_used_say_why(script, text, weights, tmp_path):
    build = f"{script}:build"
    with pytest.raises(FileNotFoundError, match="no text file at"):
        measure_script(build, tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(ValueError, match=r"short.txt holds 1 token: at least two are needed"):
        measure_script(build, tmp_path / "short.txt")
    with pytest.raises(ValueError, match="windows must be at least 1, got 0"):
        measure_script(build, text, windows=0)
    with pytest.raises(ValueError, match=r"context must be from 1 to any number, .* got 0"):
        measure_script(build, text, context=0)
    with pytest.raises(FileNotFoundError, match=r"no weights at .*none.pt"):
        measure_script(build, text, weights=tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"text.txt is not a state dict: write it with torch.save\(module.state_dict"):
        measure_script(build, text, weights=text)
    torch.save({"model": {"table": torch.zeros(2)}, "step": 3}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="not a state dict, it holds model, step: write it with"):
        measure_script(build, text, weights=tmp_path / "run.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match="is not a state dict: write it with"):
        measure_script(build, text, weights=tmp_path / "module.pt")
    torch.save({"tabel": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"do not fit the module of .*: .*Missing key.* \"table\".*\"tabel\""):
        measure_script(build, text, weights=tmp_path / "other.pt")


def test_a_script_that_fails_is_run_again(tmp_path):
    path = tmp_path / "later.py"
    path.write_text("import os\nraise RuntimeError('not yet')\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"later.py fails when it is executed, line 2: RuntimeError: not yet$"):
            load_script(f"{path}:build")


def shown(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sharpness", *map(str, arguments)])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_the_command_line_takes_scripts(script, text, weights, table):
    code, output = shown(f"{script}:build", text, "--weights", weights, "--format", "e4m3fn", "--epsilon", "0.001")
    sharpness, loss = judged(table, list(TEXT.encode()), 1e-3)
    assert code == 0
    assert f"{loss.mean():.4f}" in output and f"{sharpness.mean():.4g} ±" in output
    assert f"{len(TEXT.encode()) - 1} tokens in 8 windows of up to 8" in output and "e4m3fn" in output
    for arguments, message in (
        ((f"{script}:biuld", text), "error: "),
        ((f"{script}:nothing", text), "must return a torch.nn.Module, got NoneType"),
        ((script.parent, text, "--weights", weights), "leave --weights out"),
    ):
        code, output = shown(*arguments)
        assert (code, message in output) == (2, True)


ENCODER = """
import torch

class Encoder(torch.nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, 8)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.body = torch.nn.TransformerEncoder(layer, 1)
        self.head = torch.nn.Linear(8, vocabulary)

    def forward(self, tokens):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.body(self.embed(tokens), mask=mask, is_causal=True))

def build(vocabulary): return Encoder(vocabulary)
"""


def test_a_transformer_encoder_is_measured_as_the_study_trains_it(tmp_path, text):
    """In training mode, in which torch has no fused kernel for it, the same module has the same losses."""
    (tmp_path / "encoder.py").write_text(ENCODER)
    name = f"{tmp_path}/encoder.py:build"
    enabled = torch.backends.mha.get_fastpath_enabled()
    options = {"formats": ["e4m3fn"], "epsilons": [1e-3], "windows": 1, "context": CONTEXT, "gradients": False}
    plain, rounded = measure_script(name, text, **options).rows
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    network = load_script(name).network.train()
    tokens = torch.tensor([list(text.read_bytes())])[:, : CONTEXT + 1]
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="fpsim_eager", options={"format": "e4m3fn"})
    for row, model in ((plain, network), (rounded, compiled)):
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].double(), tokens[0, 1:])
        assert row.every[1e-3].loss == pytest.approx(float(loss), rel=1e-6)
    assert rounded.every[1e-3].loss != plain.every[1e-3].loss


def test_a_model_that_cannot_be_rounded_ends_the_command_in_one_line(tmp_path, text):
    (tmp_path / "recurrent.py").write_text(
        """
import torch

class Recurrent(torch.nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(vocabulary, 4), torch.nn.Linear(4, vocabulary)

    def forward(self, tokens):
        y = self.embed(tokens)
        return self.head(y @ torch.linalg.inv(torch.eye(4) + y[0, :4]))

def build(vocabulary): return Recurrent(vocabulary)
"""
    )
    result = CliRunner().invoke(app, ["sharpness", f"{tmp_path}/recurrent.py:build", str(text), "--format", "bf16"])
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: the model cannot be rounded to bf16: aten.linalg_inv")
