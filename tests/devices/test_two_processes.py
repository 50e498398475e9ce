"""Two processes on two GPUs exchange tensors of their GPU only, and find what one process on the processor finds."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.conftest import Finished
from devices.recipes import Stock, small
from devices.runs import assert_close, assert_same_scores, verdicts, weights
from devices.test_every_recipe import before
from devices.workers import Worker, Workers

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(workers: Workers) -> Iterator[list[Worker]]:
    """Two workers that Lightning takes for two processes of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": "2"}
    # Devices that come in several have float64; Apple's, which has none, is always a single one.
    started = [Worker("float64", LOCAL_RANK=str(rank), **job) for rank in range(2)]
    yield started
    for worker in started:
        worker.stop()


@pytest.mark.parametrize("name", ["null_space", "esd", "uce", "concept_ablation", "speed", "siss"])
def test_a_recipe(name: str, pair: list[Worker], finished: Finished, stock: Stock, tmp_path: Path) -> None:
    (alone,) = finished(name, "cpu")
    for worker in pair:
        worker.send_run(tmp_path, ["fit", *small(name, stock)], ["test", *small(name, stock)])
    for answer in [worker.receive() for worker in pair]:
        assert answer.succeeded(2), str(answer)
    assert_close(weights(tmp_path), weights(alone), before(stock))
    assert_same_scores(verdicts(tmp_path), verdicts(alone))
    for worker in pair:
        counted = worker.call(tmp_path, "devices.collectives:calls")
        assert counted["all_reduce"] > 0


@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce"])
def test_a_tensor_of_the_processor_is_refused(name: str, pair: list[Worker], tmp_path: Path) -> None:
    for worker in pair:
        said = worker.call(tmp_path, "devices.collectives:refuses", name=name)
        assert said == f"{name}: No backend type associated with device type cpu"
