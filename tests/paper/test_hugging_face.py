"""``hf:...`` gives the text that the real package ``datasets`` reads from local data; the Hub is never asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fpsim.cli.main import app
from fpsim.paper.data import DataConfig, fingerprint, load
from fpsim.paper.hugging_face import Source, parse_source, text

datasets = pytest.importorskip("datasets")

TEXTS = ["eins zwei", "", None, "drei\nvier", "fünf"]
TITLES = ["a", "b", "c", "d", "e"]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """No connection is tried, and nothing is kept outside of the test's folder."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def rows():
    return datasets.Dataset.from_dict({"text": TEXTS, "title": TITLES, "number": [1, 2, 3, 4, 5]})


def joined(texts: list[str | None]) -> bytes:
    return b"\n".join(each.encode() for each in texts if each is not None)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf:wikitext", Source("wikitext", None, "train", "text")),
        ("hf:owner/name:part", Source("owner/name", "part", "train", "text")),
        ("hf:owner/name:part@train[:10%]#body", Source("owner/name", "part", "train[:10%]", "body")),
        ("hf:name@train+test", Source("name", None, "train+test", "text")),
        ("hf:name#the body: all@once", Source("name", None, "train", "the body: all@once")),
    ],
)
def test_a_source_is_spelled_in_one_way(path, expected):
    assert parse_source(path) == expected


def test_a_folder_may_have_any_name(tmp_path):
    (tmp_path / "a@b" / "c:d").mkdir(parents=True)
    assert parse_source(f"hf:{tmp_path}/a@b/c:d/../../a@b@test") == Source(
        f"{tmp_path}/a@b/c:d/../../a@b", None, "test", "text"
    )


@pytest.mark.parametrize("write", ["to_parquet", "to_json", "to_csv"])
def test_a_folder_and_a_file_of_it_are_the_same_text(rows, tmp_path, write):
    suffix = {"to_parquet": "parquet", "to_json": "jsonl", "to_csv": "csv"}[write]
    path = tmp_path / "data" / f"train.{suffix}"
    path.parent.mkdir()
    getattr(rows, write)(path)
    # An empty string and none at all look the same in CSV.
    expected = joined([each or None for each in TEXTS] if write == "to_csv" else TEXTS)
    assert text(f"hf:{path.parent}") == expected
    assert text(f"hf:{path}") == expected
    assert text(f"hf:{path}@train[:1]") == b"eins zwei"
    assert text(f"hf:{path.parent}@train[-2:]#title") == b"d\ne"


def test_what_was_saved_to_disk(rows, tmp_path):
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert text("hf:one") == text("hf:two") == joined(TEXTS)
    assert text("hf:two@test#title") == b"a"
    with pytest.raises(ValueError, match="one was saved as a single split: name neither"):
        text("hf:one@test")


def test_lines_and_splits_of_text_files(tmp_path):
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.txt").write_text("eins\n\nzwei\n")
    (tmp_path / "lines" / "test.txt").write_text("drei\n")
    assert text("hf:lines") == b"eins\n\nzwei"
    assert text("hf:lines@train+test") == b"eins\n\nzwei\ndrei"


def test_a_run_takes_the_bytes_of_a_dataset(tmp_path):
    lines = [f"line {index}" for index in range(100)]
    datasets.Dataset.from_dict({"text": lines}).save_to_disk(tmp_path / "lines")
    whole = torch.cat(load(DataConfig("hf:lines"), context=8))
    assert bytes(whole.tolist()) == "\n".join(lines).encode()


def test_the_fingerprint_is_that_of_local_content(rows, tmp_path):
    config = DataConfig("hf:data")
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    before = fingerprint(config)
    assert fingerprint(config) == before
    rows.select(range(4)).to_parquet(tmp_path / "data" / "train.parquet")
    assert fingerprint(config) != before
    assert bytes(torch.cat(load(config, context=1)).tolist()) == b"eins zwei\n\ndrei\nvier"
    hub = [fingerprint(DataConfig(name)) for name in ("hf:owner/name", "hf:owner/name@test")]
    assert len({before, *hub}) == 3


@pytest.mark.parametrize(
    ("path", "error", "complaint"),
    [
        ("hf:data#body", ValueError, "no column 'body': write #COLUMN, one of text, title, number"),
        ("hf:data#titel", ValueError, "no column 'titel' .did you mean 'title'"),
        ("hf:data#number", ValueError, "column 'number' holds int64 and no text"),
        ("hf:data@valid", ValueError, r"Unknown split .valid.*one of .'train'.; write hf:NAME"),
        ("hf:data:part", ValueError, "'part' not found.*default"),
        ("hf:data/train.xyz", ValueError, r"train\.xyz is none of the files .*\.parquet"),
        ("hf:./nothing", FileNotFoundError, r"no dataset at \./nothing .*OWNER/NAME"),
        ("hf:/no/such/folder", FileNotFoundError, "no dataset at /no/such/folder"),
        ("hf:empty", FileNotFoundError, "contain any data files"),
        ("hf:", ValueError, r"'hf:' names no dataset: write hf:NAME\[:CONFIG\]\[@SPLIT\]\[#COLUMN\]"),
        ("hf:owner/name", ConnectionError, r"owner/name.*save_to_disk\('FOLDER'\), and write hf:FOLDER"),
    ],
)
def test_what_is_not_there_is_named_with_the_remedy(rows, tmp_path, path, error, complaint):
    for folder in ("data", "empty"):
        (tmp_path / folder).mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    (tmp_path / "data" / "train.xyz").touch()
    with pytest.raises(error, match=complaint):
        text(path)


def test_a_sweep_asks_for_a_dataset_before_it_starts_workers(tmp_path: Path):
    done = CliRunner().invoke(app, ["study", "run", "--data", "hf:owner/name", "--out", "out"])
    assert done.exit_code == 2
    assert "save_to_disk" in done.stderr
    assert not (tmp_path / "out").exists()
