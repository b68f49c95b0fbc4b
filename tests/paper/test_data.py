"""Tokens are bytes, parts and batches are slices, and the same seed gives the same slices."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from fpsim.paper.data import batches, read_text, shakespeare, split, tokenize, validation_batches


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
