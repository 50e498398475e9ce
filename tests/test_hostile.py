"""Weights made to do harm: refused in one sentence, quickly, with nothing run and nothing written elsewhere."""

from __future__ import annotations

import json
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from lit_unlearn import cli
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.edits.export import check_output

NAME = "text_encoder.encoder.layers.1.mlp.fc2.weight"
FACTS: dict[str, Any] = {
    "method": "ESD",
    "concepts": ["dog"],
    "base_model": "emoji-sd",
    "base_fingerprint": "0" * 64,
    "config": {"dtype": "float32", "num_inference_steps": 4},
}


def delta(facts: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None) -> bytes:
    """An exported delta, byte for byte."""
    metadata = {name: json.dumps(value) for name, value in {**FACTS, **(facts or {})}.items()}
    return save({NAME: torch.ones(2, 3)} if weights is None else weights, metadata)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that exists as soon as something hostile has run."""
    return tmp_path / "victim"


class Payload:
    """Makes the file when it is unpickled with trust."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.victim,))


def refused(path: Path, seconds: float = 30) -> str:
    started = time.process_time()
    with pytest.raises(ValueError, match="ckpt_path=") as caught:
        read_edit(path)
    assert time.process_time() - started < seconds
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


# ------------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("name", ["edit.safetensors", "edit.ckpt"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_by_another_name_is_not_run(tmp_path: Path, victim: Path, name: str, protocol: int) -> None:
    content = pickle.dumps(Payload(victim), protocol)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)
    assert not victim.exists()
    pickle.loads(content)
    assert victim.exists()  # it would have


@pytest.mark.parametrize("name", ["edit.safetensors", "edit.ckpt"])
def test_a_checkpoint_with_a_payload_is_not_run(tmp_path: Path, victim: Path, name: str) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Payload(victim)}, tmp_path / name)
    refused(tmp_path / name)
    assert not victim.exists()


def test_an_archive_that_unpacks_to_much_more_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "edit.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("edit/data.pkl", bytes(50_000_000))
        archive.writestr("../../outside", b"x")
    assert "it is compressed" in refused(path, seconds=5)
    assert not (tmp_path.parent.parent / "outside").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"\x80\x02K\x01.", b"\x80\x02]q\x00h\x05.", b"\x80\x02(tR."])
def test_an_archive_with_a_pickle_of_nonsense(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "edit.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("edit/data.pkl", content)
        archive.writestr("edit/version", b"3")
        archive.writestr("edit/byteorder", b"little")
    assert str(path) in refused(path)


# -------------------------------------------------------------------------------------------------------------- deltas


def test_the_delta_that_the_tests_change_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    path.write_bytes(delta())
    assert read_edit(path).method == "ESD"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1),
        struct.pack("<Q", 10_000_000_000) + b"{" * 100,
        struct.pack("<Q", 99_000_000) + b" " * 1000,
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 200_000) + b'{"a":' * 40_000,
        delta()[:-1],
        delta()[: len(delta()) // 2],
        delta() + b"more",
        struct.pack("<Q", 62) + b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}'[:62],
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1,1],"data_offsets":[-4,4]}}   ' + bytes(4),
    ],
    ids=range(13),
)
def test_headers_that_lie(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "edit.safetensors"
    path.write_bytes(content)
    assert "corrupt" in refused(path)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd.weight",
        "/etc/ssl.weight",
        "unet/../vae.weight",
        "unet..weight",
        "unet.",
        "vae_.x",
        "scheduler.weight",
        "unet.a\nb",
        "unet.\x1b[2J",
        "unet.ä",
        "",
    ],
)
def test_names_of_weights_lead_nowhere(tmp_path: Path, name: str) -> None:
    path = tmp_path / "edit.safetensors"
    path.write_bytes(delta(weights={name: torch.ones(1)}))
    message = refused(path)
    assert "is no name of a weight" in message and message.isprintable()


@pytest.mark.parametrize(
    ("facts", "weights"),
    [
        ({"method": 5}, None),
        ({"concepts": "dog"}, None),
        ({"concepts": [1]}, None),
        ({"base_model": None}, None),
        ({"base_fingerprint": []}, None),
        ({"config": []}, None),
        ({"config": {"dtype": "load"}}, None),
        ({"config": {"dtype": ["float32"]}}, None),
        ({"config": {"num_inference_steps": 10**9}}, None),
        ({"config": {"guidance_scale": "4"}}, None),
        ({"config": {"guidance_scale": float("nan")}}, None),
        ({"config": {"revision": 1}}, None),
        ({"config": {"clip_skip": "all"}}, None),
        ({"config": {"clip_skip": -1}}, None),
        ({"base_sha256": {"../x": "0"}}, None),
        ({"base_sha256": [1]}, None),
        ({}, {NAME: torch.full((2,), float("nan"))}),
        ({}, {NAME: torch.ones(2, dtype=torch.int64)}),
    ],
    ids=range(18),
)
def test_provenance_of_the_wrong_kind(tmp_path: Path, facts: dict[str, Any], weights: dict[str, Tensor] | None) -> None:
    path = tmp_path / "edit.safetensors"
    path.write_bytes(delta(facts, weights))
    assert "is no valid edit" in refused(path)


def test_deep_metadata(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    metadata = {name: "[" * 100_000 for name in FACTS}
    path.write_bytes(save({NAME: torch.ones(1)}, metadata))
    assert "is corrupt (metadata: " in refused(path)


def test_a_scheduler_is_a_scheduler(broken_model: Callable[..., Path]) -> None:
    def name_a_pipeline(folder: Path) -> None:
        path = folder / "model_index.json"
        index = {**json.loads(path.read_text(encoding="utf-8")), "scheduler": ["diffusers", "DiffusionPipeline"]}
        path.write_text(json.dumps(index), encoding="utf-8")

    folder = broken_model(name_a_pipeline)
    with pytest.raises(
        ValueError, match=r"has the scheduler 'DiffusionPipeline', which is not for models that predict"
    ):
        load_pipeline(str(folder))


# ------------------------------------------------------------------------------------------------------------- outputs


def test_an_export_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/provenance.json").write_text("{}", encoding="utf-8")
    for name, target in (("link", "precious"), ("dangling.safetensors", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / target)
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="is a symbolic link"):
                check_output(tmp_path / name, overwrite)


def test_a_delta_is_not_written_through_a_linked_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "empty.ckpt").touch()
    for kind in (["--delta"], ["--lora", "auto"]):
        assert (
            cli.main(
                [
                    "export",
                    "--ckpt_path",
                    str(tmp_path / "empty.ckpt"),
                    "-o",
                    str(tmp_path / "link"),
                    *kind,
                    "--overwrite",
                ]
            )
            == 2
        )
        assert "is a symbolic link" in capsys.readouterr().err
    assert not list((tmp_path / "precious").iterdir())
