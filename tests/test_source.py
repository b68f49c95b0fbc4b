"""The hash of the source: no file of fpsim can change, move or appear without another key."""

import shutil
from pathlib import Path

import pytest
import torch

import fpsim
from fpsim import source
from fpsim.casts import parse_cast
from fpsim.compile_backend.passes.rounding_pass import RoundingPass
from fpsim.scaling.scale import MX_RULES
from fpsim.source import PACKAGES, PROVEN, SCALES_PROVEN, hash_of_folders, proven_hash, source_hash
from fpsim.verify.scales import SCALED_FORMATS


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A copy of all sources of fpsim, as they lie in a checkout."""
    copies = {package: tmp_path / package for package in PACKAGES}
    for package, copy in copies.items():
        shutil.copytree(source._folder(package), copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copies


def test_a_copy_has_the_same_hash(folders: dict[str, Path]) -> None:
    assert hash_of_folders(folders) == source_hash()


def test_a_file_that_moves_into_a_new_folder_and_is_edited_there_changes_the_hash(folders: dict[str, Path]) -> None:
    keys = [hash_of_folders(folders)]
    for package in PACKAGES:
        room = folders[package] / "a" / "new" / "room"
        room.mkdir(parents=True)
        moved = Path(shutil.move(folders[package] / "__init__.py", room / "__init__.py"))
        keys.append(hash_of_folders(folders))
        moved.write_text(moved.read_text() + "# edited\n")
        keys.append(hash_of_folders(folders))
    assert len(set(keys)) == len(keys)


def test_every_file_counts(folders: dict[str, Path]) -> None:
    before = hash_of_folders(folders)
    for file in [file for folder in folders.values() for file in folder.rglob("*.py")]:
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert hash_of_folders(folders) != before, file
        file.write_bytes(content)
    assert hash_of_folders(folders) == before


def test_what_is_written_beside_the_source_does_not_count(folders: dict[str, Path]) -> None:
    before = hash_of_folders(folders)
    cache = folders["fpsim"] / "__pycache__"
    cache.mkdir()
    (cache / "float.cpython-311.pyc").write_bytes(b"compiled")
    assert hash_of_folders(folders) == before


def test_text_does_not_pass_from_one_file_into_the_next(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, (first, second) in {one: ("ab", "c"), other: ("a", "bc")}.items():
        folder.mkdir()
        (folder / "1.py").write_text(first)
        (folder / "2.py").write_text(second)
    assert hash_of_folders({"x": one}) != hash_of_folders({"x": other})


def test_the_pass_the_kernels_and_the_scales_have_this_hash_in_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm.graph)
        return gm

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return fpsim.round(x, "e4m3fn", scale="power_of_two") + fpsim.round(x, "e5m2", rounding="stochastic", seed=0)

    torch.compile(rounded, backend=backend, fullgraph=True)(torch.ones(3))
    ops = torch.ops.fpsim
    for op in (ops.round.default, ops.round_stochastic.default, ops.power_of_two_scale.default):
        calls = graphs[0].find_nodes(op="call_function", target=op)
        width = (
            torch.backends.cpu.get_cpu_capability()
        )  # Inductor compiles cached code again, for the width of the process
        assert calls and all(f"{source_hash()} {width}" in call.args for call in calls)
    key = RoundingPass(fpsim.Policy(), [], []).uuid()
    monkeypatch.setattr("fpsim.compile_backend.passes.rounding_pass.SOURCE", "another version")
    assert RoundingPass(fpsim.Policy(), [], []).uuid() != key


def test_the_proof_names_files_that_exist_and_changes_with_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "fpsim"
    shutil.copytree(source._folder("fpsim"), copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source, "_folder", lambda package: copy)
    keys = {proven_hash()}
    for name in PROVEN:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b"\n")
        source.proven_hash.cache_clear()
        keys.add(proven_hash())
        (copy / name).write_bytes(content)
    source.proven_hash.cache_clear()
    assert len(keys) == 1 + len(PROVEN)


def test_the_record_of_the_proofs_is_of_this_source() -> None:
    """If this fails, a file of `PROVEN` has changed: run ``make prove`` (36 modes of half a minute or more)."""
    record = (Path(__file__).parent / "exhaustive.md").read_text()
    assert f"source {proven_hash()})" in record
    rows = [line.split(" | ") for line in record.splitlines() if "4,294,967,296" in line]
    assert len(rows) == 36 and all(row[4] == "0" for row in rows)


def test_the_record_of_the_proofs_of_scales_is_of_this_source() -> None:
    """If this fails, a file of `SCALES_PROVEN` has changed: run ``make prove-scales`` (5 to 10 minutes)."""
    record = (Path(__file__).parent / "exhaustive_scales.md").read_text()
    assert f"source {proven_hash(SCALES_PROVEN)})" in record
    rows = [line.split(" | ") for line in record.splitlines() if "all: 2,147,483,648" in line]
    assert all(row[4] == "0" for row in rows)
    proven = {(row[0].removeprefix("| "), row[1].rpartition(":")[2]) for row in rows}
    assert proven == {(parse_cast(name).format.name, rule) for name in SCALED_FORMATS for rule in MX_RULES}
