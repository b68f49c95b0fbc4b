"""Tokens are bytes, parts and batches are slices, and the same seed gives the same slices."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from fpsim.paper.data import (
    DataConfig,
    batches,
    check_vocabulary,
    fingerprint,
    load,
    read_text,
    shakespeare,
    split,
    spoil,
    tokenize,
    validation_batches,
)


def test_a_token_is_a_byte():
    assert tokenize("Hé\n".encode()).tolist() == [0x48, 0xC3, 0xA9, 0x0A]
    assert tokenize(b"x").dtype == torch.uint8
    assert tokenize(b"").shape == (0,)


def test_the_embedded_text_holds_all_plays_in_a_fixed_order():
    text = shakespeare()
    assert text == shakespeare()
    assert len(text) > 5_000_000
    text.decode("utf-8")
    titles = [text.index(title) for title in (b"# As You Like It", b"# Hamlet", b"# Macbeth", b"# Timon of Athens")]
    assert titles == sorted(titles)
    assert b"Who's there?" in text


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xff\x00\r\n")
    assert read_text(path) == b"\xff\x00\r\n"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such\.txt"):
        read_text(tmp_path / "no-such.txt")
    with pytest.raises(IsADirectoryError, match="name one text file"):
        read_text(tmp_path)


def test_the_last_tenth_is_for_validation():
    tokens = torch.arange(257) % 256
    train, validation = split(tokens, context=5)
    assert torch.equal(train, tokens[:232])
    assert torch.equal(validation, tokens[232:])


def test_another_share_for_validation():
    train, validation = split(torch.arange(100), context=3, fraction=0.5)
    assert train.tolist() == list(range(50))
    assert validation.tolist() == list(range(50, 100))


def test_a_short_text_is_refused_with_its_numbers_and_the_remedy():
    with pytest.raises(ValueError, match=r"100 bytes leave 90 for training and 10 for validation.*= 17; use.* 171 by"):
        split(torch.zeros(100), context=16)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("context", [1, 2, 16, 127])
def test_the_remedy_is_enough(context, fraction):
    with pytest.raises(ValueError, match="too short") as error:
        split(torch.zeros(2), context=context, fraction=fraction)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    split(torch.zeros(needed), context=context, fraction=fraction)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_part_may_not_be_empty(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(torch.zeros(100), context=1, fraction=fraction)


def test_batches_are_slices_at_the_generators_offsets(data):
    generator = torch.Generator().manual_seed(7)
    for inputs, targets in islice(batches(data.train, batch=3, context=10, seed=7), 5):
        starts = torch.randint(len(data.train) - 10, (3,), generator=generator).tolist()
        assert torch.equal(inputs, torch.stack([data.train[start : start + 10] for start in starts]))
        assert torch.equal(targets, torch.stack([data.train[start + 1 : start + 11] for start in starts]))
        assert inputs.dtype == targets.dtype == torch.int64


def test_batches_depend_on_the_seed_alone(data):
    def first(seed: int) -> torch.Tensor:
        return torch.stack([inputs for inputs, _ in islice(batches(data.train, batch=2, context=8, seed=seed), 4)])

    state = torch.get_rng_state()
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(state, torch.get_rng_state())


def test_batches_reach_both_ends_of_the_text():
    tokens = torch.arange(6)
    seen = {tuple(row.tolist()) for x, _ in islice(batches(tokens, batch=8, context=4, seed=0), 8) for row in x}
    assert seen == {(0, 1, 2, 3), (1, 2, 3, 4)}


def test_validation_windows_are_evenly_spaced_from_end_to_end():
    tokens = torch.arange(101)
    parts = validation_batches(tokens, batch=2, context=10, count=3)
    assert [inputs[:, 0].tolist() for inputs, _ in parts] == [[0, 18], [36, 54], [72, 90]]
    assert all(inputs.shape == targets.shape == (2, 10) for inputs, targets in parts)
    assert parts[-1][1][-1, -1] == 100


def test_one_validation_window_starts_at_the_first_token():
    [(inputs, targets)] = validation_batches(torch.arange(50), batch=1, context=4, count=1)
    assert inputs.tolist() == [[0, 1, 2, 3]]
    assert targets.tolist() == [[1, 2, 3, 4]]


# -- other sources -----------------------------------------------------------------------------------------------------


def test_the_default_is_the_embedded_text():
    expected = split(tokenize(shakespeare()), context=16)
    found = load(DataConfig(), context=16)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_file_and_a_folder_of_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("zwei " * 30)
    (tmp_path / "one.txt").write_text("eins " * 30)
    (tmp_path / "three.csv").write_text("not text")
    whole = torch.cat(load(DataConfig(str(tmp_path)), context=4))
    assert bytes(whole.tolist()) == b"zwei " * 30 + b"\n" + b"eins " * 30
    whole = torch.cat(load(DataConfig(str(tmp_path / "one.txt")), context=4))
    assert bytes(whole.tolist()) == b"eins " * 30


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no text at"):
        load(DataConfig(str(tmp_path / "nothing.txt")), context=4)
    with pytest.raises(ValueError, match=r"no text in the folder .*\*\.txt.*train\.bin"):
        load(DataConfig(str(tmp_path)), context=4)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 20)
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"):
        load(DataConfig(str(tmp_path / "latin.txt")), context=4)
    with pytest.raises(ValueError, match=r"unknown quality 'shufled' .did you mean 'shuffled'"):
        DataConfig(quality="shufled")
    with pytest.raises(ValueError, match="level is a share"):
        DataConfig(quality="noisy", level=2)


def test_nanogpts_token_files(tmp_path):
    train, validation = np.arange(50000, 50200, dtype=np.uint16), np.arange(100, dtype=np.uint16)
    train.tofile(tmp_path / "train.bin")
    validation.tofile(tmp_path / "val.bin")
    found = load(DataConfig(str(tmp_path)), context=8)
    assert found.train.tolist() == train.tolist()
    assert found.validation.tolist() == validation.tolist()
    inputs, targets = next(batches(found.train, batch=3, context=8, seed=0))
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert int(inputs.min()) >= 50000
    alone = load(DataConfig(str(tmp_path / "train.bin"), validation=0.25), context=8)
    assert (len(alone.train), len(alone.validation)) == (150, 50)
    check_vocabulary(found, 50257)
    with pytest.raises(ValueError, match="token 50199 and the model 256 words"):
        check_vocabulary(found, 256)


def test_a_broken_token_file_is_refused(tmp_path):
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"odd\.bin holds 3 bytes: nanoGPT's token files hold two per token"):
        load(DataConfig(str(tmp_path / "odd.bin")), context=1)


# -- quality -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(256 * 40 + 17, dtype=torch.int64).remainder(251).to(torch.uint8)


def test_clean_text_is_left_alone(tokens):
    assert spoil(tokens, DataConfig()) is tokens
    assert spoil(tokens, DataConfig(quality="noisy", level=0.0)) is tokens


@pytest.mark.parametrize("level", [0.25, 1.0])
def test_shuffled_text_keeps_the_characters_of_each_block(tokens, level):
    found = spoil(tokens, DataConfig(quality="shuffled", level=level))
    before, after = tokens[:10240].view(40, 256), found[:10240].view(40, 256)
    assert torch.equal(before.sort(1).values, after.sort(1).values)
    assert int((before != after).any(1).sum()) == 40 * level
    assert torch.equal(tokens[10240:], found[10240:])


def test_duplicated_text_repeats_sixteen_blocks(tokens):
    found = spoil(tokens, DataConfig(quality="duplicated", level=0.5))
    before = {tuple(block) for block in tokens[:10240].view(40, 256).tolist()}
    after = [tuple(block) for block in found[:10240].view(40, 256).tolist()]
    assert set(after) < before
    assert 20 <= len(set(after)) <= 36


def test_noise_replaces_the_share_that_was_asked_for(tokens):
    found = spoil(tokens, DataConfig(quality="noisy", level=0.2))
    changed = float((found != tokens).float().mean())
    assert changed == pytest.approx(0.2 * 250 / 251, abs=4 * (0.2 * 0.8 / len(tokens)) ** 0.5)
    assert set(found.tolist()) <= set(tokens.tolist())


@pytest.mark.parametrize("quality", ["shuffled", "duplicated", "noisy"])
def test_what_is_spoiled_depends_on_its_seed_alone(tokens, quality):
    config = DataConfig(quality=quality, level=0.5)
    before = tokens.clone()
    assert torch.equal(spoil(tokens, config), spoil(tokens, config))
    assert not torch.equal(spoil(tokens, config), spoil(tokens, replace(config, quality_seed=1)))
    assert torch.equal(tokens, before)


def test_validation_stays_clean():
    clean = load(DataConfig(), context=16)
    spoiled = load(DataConfig(quality="shuffled"), context=16)
    assert torch.equal(clean.validation, spoiled.validation)
    assert not torch.equal(clean.train, spoiled.train)


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("eins " * 30)
    one = fingerprint(DataConfig(str(path)))
    path.rename(tmp_path / "b.txt")
    assert fingerprint(DataConfig(str(tmp_path / "b.txt"))) == one
    assert fingerprint(DataConfig(str(tmp_path / "b.txt"), quality="noisy")) != one
    (tmp_path / "b.txt").write_text("zwei " * 30)
    assert fingerprint(DataConfig(str(tmp_path / "b.txt"))) != one


def test_a_run_that_goes_on_leaves_batches_out(data):
    stream = batches(data.train, batch=2, context=12, seed=3)
    later = batches(data.train, batch=2, context=12, seed=3, start=5)
    expected = list(islice(stream, 8))[5:]
    found = list(islice(later, 3))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(found, expected, strict=True))
