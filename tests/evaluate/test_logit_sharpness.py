"""``fpsim sharpness`` measures for a checkpoint what the library measures for its model."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fpsim.evaluate.logit_sharpness import measure_checkpoint
from fpsim.sharpness import gradient_norm, logit_stream, summarize

transformers = pytest.importorskip("transformers")

TEXT = "It was the best of times, it was the worst of times – naïve. " * 4
CONTEXT = 32


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=CONTEXT,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def windows(tokens: list[int], context: int):
    """Inputs and targets, the last window as short as it is."""
    for start in range(0, len(tokens) - 1, context):
        piece = torch.tensor([tokens[start : start + context + 1]])
        yield piece[:, :-1], piece[:, 1:]


def test_every_byte_but_the_first_is_predicted_once(checkpoint, network, text):
    report = measure_checkpoint(checkpoint, text)
    tokens = list(TEXT.encode())
    (row,) = report.rows
    assert (report.windows, report.context) == (-(-(len(tokens) - 1) // CONTEXT), CONTEXT)
    assert list(row.every) == list(row.last) == [5e-4, 1e-3]
    for epsilon in row.every:
        want = summarize(logit_stream(network, windows(tokens, CONTEXT), epsilon=epsilon))
        assert vars(row.every[epsilon]) == pytest.approx(vars(want), rel=1e-4)
        last = summarize(logit_stream(network, windows(tokens, CONTEXT), epsilon=epsilon, tokens="last"))
        assert vars(row.last[epsilon]) == pytest.approx(vars(last), rel=1e-4)
    assert row.every[5e-4].tokens == len(tokens) - 1
    assert row.last[5e-4].tokens == report.windows
    assert row.gradient_norm == pytest.approx(gradient_norm(network, windows(tokens, CONTEXT)), rel=1e-4)


def test_formats_stand_side_by_side_in_the_table(checkpoint, text):
    told = []
    report = measure_checkpoint(
        checkpoint,
        text,
        formats=["bf16", "e5m2"],
        epsilons=[1e-3],
        windows=2,
        gradients=False,
        progress=lambda *state: told.append(state),
    )
    assert [row.format for row in report.rows] == ["none", "bf16", "e5m2"]
    assert told == [(count, 6) for count in range(1, 7)]
    errors = [abs(row.every[1e-3].loss - report.rows[0].every[1e-3].loss) for row in report.rows]
    assert 0 == errors[0] < errors[1] < errors[2]
    console = Console(width=140, file=io.StringIO())
    console.print(report.table())
    shown = console.file.getvalue()
    assert "e5m2" in shown
    assert f"{report.rows[2].every[1e-3].loss:.4f}" in shown
    assert "64 tokens in 2 windows of up to 32" in shown


def test_formats_are_read_as_everywhere(checkpoint, text):
    formats = ["e4m3fn", "e4m3fn+e5m2", "paper:e4m3fn", "fp32"]
    rows = measure_checkpoint(checkpoint, text, formats=formats, epsilons=[1e-3], windows=1).rows
    none, one, two, truncated, fp32 = rows
    assert [row.format for row in rows] == ["none", *formats]
    assert one.every == two.every and one.gradient_norm != two.gradient_norm  # they differ in backward alone
    assert truncated.every != one.every
    assert fp32.every[1e-3].loss == pytest.approx(none.every[1e-3].loss, rel=1e-6)  # the carrier is float32


def test_lbfgsb_lies_below(checkpoint, text):
    exact, searched = (
        measure_checkpoint(checkpoint, text, method=method, windows=1, gradients=False).rows[0].every[5e-4].sharpness
        for method in ("exact", "lbfgsb")
    )
    assert 0 < searched <= exact * (1 + 1e-12)


def test_a_tokenizer_in_the_folder_is_used(network, text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(dict.fromkeys(TEXT.split()), 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, **words}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    network.save_pretrained(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (row,) = measure_checkpoint(tmp_path / "model", text, gradients=False).rows
    ids = [words[word] for word in TEXT.split()]
    want = summarize(logit_stream(network, windows(ids, CONTEXT)))
    assert vars(row.every[5e-4]) == pytest.approx(vars(want), rel=1e-4)


def test_short_texts_make_one_short_window(checkpoint, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("ab")
    report = measure_checkpoint(checkpoint, path, gradients=False)
    assert report.windows == 1
    assert report.rows[0].every[5e-4].tokens == 1
    path.write_text("a")
    with pytest.raises(ValueError, match="holds 1 token:"):
        measure_checkpoint(checkpoint, path)


def test_long_files_are_not_read_whole(checkpoint, tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes("é".encode() * 5000 + b"\xff")  # not UTF-8, but beyond what is needed
    report = measure_checkpoint(checkpoint, path, windows=1, context=8, gradients=False)
    assert report.rows[0].every[5e-4].tokens == 8


def test_errors_name_the_value_and_the_remedy(checkpoint, network, text, tmp_path):
    with pytest.raises(FileNotFoundError, match="no Hugging Face checkpoint at"):
        measure_checkpoint(tmp_path, text)
    with pytest.raises(FileNotFoundError, match="no text file at"):
        measure_checkpoint(checkpoint, tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError, match="is a folder: name one text file"):
        measure_checkpoint(checkpoint, tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match="not UTF-8: byte 0xef at offset 2"):
        measure_checkpoint(checkpoint, tmp_path / "latin.txt")
    with pytest.raises(ValueError, match=r"context must be from 1 to 32, .* got 33"):
        measure_checkpoint(checkpoint, text, context=33)
    with pytest.raises(ValueError, match="windows must be at least 1, got 0"):
        measure_checkpoint(checkpoint, text, windows=0)
    with pytest.raises(ValueError, match="epsilons is empty"):
        measure_checkpoint(checkpoint, text, epsilons=[])
    with pytest.raises(ValueError, match="e9m99x"):
        measure_checkpoint(checkpoint, text, formats=["e9m99x"])
    smaller = transformers.LlamaConfig(**{**network.config.to_dict(), "vocab_size": 100})
    transformers.LlamaForCausalLM(smaller).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match=r"no tokenizer in .* its model has 100 words"):
        measure_checkpoint(tmp_path / "smaller", text)


@pytest.mark.parametrize("change", ["cut off", "without the head"])
def test_a_broken_checkpoint_is_an_error(checkpoint, text, tmp_path, change):
    """Weights that are missing would be random."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    if change == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
        message = r"broken cannot be read: SafetensorError: "
    else:
        kept = {name: tensor for name, tensor in load_file(weights).items() if name != "lm_head.weight"}
        save_file(kept, weights, metadata={"format": "pt"})
        message = r"broken lacks 1 weight of its model: lm_head.weight"
    with pytest.raises(ValueError, match=message):
        measure_checkpoint(broken, text, windows=1)
