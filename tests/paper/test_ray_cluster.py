"""A sweep on a running cluster, by its address, gives the same bits, and errors instead of waiting for ever."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fpsim.paper.config import run_key
from fpsim.paper.storage import read_records
from fpsim.paper.sweeps import read_sweep
from fpsim.paper.training import run
from fpsim.paper.workers import RayPool

pytest.importorskip("ray")
pytest.importorskip("pyarrow")


def free_port() -> int:
    """Above those that Ray gives to its workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Cluster:
    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two cores on this machine, behind a token of its own: Ray listens on all interfaces."""
    folder = tempfile.mkdtemp(prefix="ray")  # not pytest's: the names of sockets must be short
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    options = {
        "port": port,
        "temp-dir": folder,
        "include-dashboard": "false",
        "dashboard-agent-listen-port": free_port(),
        "object-store-memory": 100_000_000,
    }
    arguments = [*command, *(f"--{name}={value}" for name, value in options.items())]
    log = Path(folder) / "start.log"
    with log.open("w") as output:
        head = subprocess.Popen(arguments, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Cluster(f"127.0.0.1:{port}", environment)
    finally:
        head.send_signal(signal.SIGTERM)  # ends the rest too, unlike `ray stop` only what it has started
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def study(*arguments: str, cluster: Cluster) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fpsim.cli.study", "run", "--address", cluster.address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=cluster.environment)


def test_a_cluster_computes_the_same_bits(cluster, text, tmp_path):
    source, out = tmp_path / "times.txt", tmp_path / "out"
    source.write_bytes(text)
    size = ["--model", "toy", "--data", str(source), "--context", "12", "--steps", "4", "--batch", "4"]
    what = ["--formats", "e8m3/stochastic", "--seeds", "2", "--learning-rates", "1e-2", "--interpret"]
    done = study(*size, *what, "--out", str(out), cluster=cluster)
    assert done.returncode == 0, done.stderr
    runs, facts = read_sweep(out)
    assert len(runs) == 2 and facts["failures"] == []
    for each in runs:
        history, _ = read_records(out / "runs" / f"{run_key(each.config)}.parquet")
        assert history == run(each.config)


def test_what_no_machine_has_is_not_waited_for(cluster, tmp_path):
    done = study("--gpus", "1", "--interpret", "--out", str(tmp_path / "out"), cluster=cluster)
    assert done.returncode == 2
    assert "a run asks Ray for 1 CPU and 1 GPU, and no machine has that much: there are 2 CPU and 0" in done.stderr


def test_an_address_where_nothing_listens_is_refused_at_once():
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no Ray cluster answers at 127\.0\.0\.1:\d+ .*ray start --head"):
        RayPool(1, workers=1, address=f"127.0.0.1:{free_port()}", resources={})
    assert time.monotonic() - start < 30


def test_ray_started_here_has_room_for_the_workers_that_were_asked_for():
    pool = RayPool(5, workers=2, address=None, resources={"num_cpus": 2.0})
    try:
        assert pool.workers == 2
    finally:
        pool.close()
