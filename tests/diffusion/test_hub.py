from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import get_session

from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.hub import command

COMMIT, MODEL = "0" * 39 + "1", "owner/name"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def requests(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses of models that are asked for; nothing answers."""
    asked: list[str] = []
    session = get_session()
    unreachable: Any = next(kind for kind in _errors(session) if kind.__name__ == "ConnectError")

    def send(request: Any, **_: Any) -> None:
        if request.url.path.startswith("/api/models/"):  # newer clients once ask for something else, of themselves
            asked.append(request.url.path)
        raise unreachable("no network", request=request)

    monkeypatch.setattr(session, "send", send)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def _errors(session: Any) -> list[type]:
    """Classes of the module that the hub's client is from: httpx or its successor."""
    module = __import__(type(session).__module__.partition(".")[0])
    return [value for value in vars(module).values() if isinstance(value, type)]


@pytest.fixture
def snapshot(cache: Path, tiny_sd: Path) -> Path:
    """``tiny_sd`` in the cache as ``MODEL``, its main branch at ``COMMIT``."""
    repository = cache / "models--owner--name"
    shutil.copytree(tiny_sd, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT, encoding="utf-8")
    return repository / "snapshots" / COMMIT


def test_without_network_one_look_up_then_the_ways_out(requests: list[str]) -> None:
    base = BaseModel.find(MODEL, "v1")
    assert not requests
    with pytest.raises(ValueError, match=r"no such folder, and the hub, .* cannot be reached") as caught:
        base.fetch()
    assert requests == ["/api/models/owner/name/revision/v1"]
    for said in (MODEL, "model_index.json", command(MODEL, "v1"), "HF_HOME", "give a folder"):
        assert said in str(caught.value)


def test_offline_there_is_not_even_one(requests: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot be reached"):
        BaseModel.find(MODEL).fetch()


def test_a_name_beside_a_folder_may_be_mistyped(
    requests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    with pytest.warns(UserWarning, match="no folder models/sd"), pytest.raises(ValueError, match="no such folder"):
        BaseModel.find("models/sd").fetch()
    assert len(requests) == 1


def test_a_commit_in_the_cache_is_checked_without_network(snapshot: Path, requests: list[str]) -> None:
    base = BaseModel.find(MODEL, COMMIT)
    assert (base.folder, base.commit, base.place) == (snapshot, COMMIT, MODEL)
    assert base.names and base.fetch() == snapshot
    index = json.loads((snapshot / "model_index.json").read_text(encoding="utf-8"))
    index["vae"][1] = "AutoencoderTiny"
    (snapshot / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        BaseModel.find(MODEL, COMMIT)
    assert not requests


def test_a_branch_in_the_cache_is_looked_up_and_taken_without_network(snapshot: Path, requests: list[str]) -> None:
    base = BaseModel.find(MODEL)
    assert base.folder is None and not base.names
    with pytest.warns(UserWarning, match=f"taken from the cache, commit {COMMIT}"):
        assert base.fetch() == snapshot
    assert base.names and base.commit == COMMIT and len(requests) == 1


def test_a_cache_that_lacks_weights_is_looked_up(snapshot: Path, requests: list[str]) -> None:
    next((snapshot / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be reached"):
        BaseModel.find(MODEL, COMMIT).fetch()
    assert len(requests) == 1


@pytest.fixture
def remote(snapshot: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Pretends that the hub has ``tiny_sd`` with these files; returns the patterns of each download."""

    def build(files: list[str]) -> list[list[str]]:
        downloads: list[list[str]] = []

        def download(model: str, revision: str | None, allow_patterns: list[str]) -> str:
            downloads.append(allow_patterns)
            return str(snapshot)

        siblings = [huggingface_hub.hf_api.RepoSibling(rfilename=name) for name in files]
        info = type("Info", (), {"siblings": siblings})()
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return downloads

    return build


def test_configurations_come_first_then_the_weights_of_one_variant(remote: Callable[..., list[list[str]]]) -> None:
    stem = "diffusion_pytorch_model"
    downloads = remote(
        [
            "text_encoder/model.safetensors",
            "text_encoder/model.fp16.safetensors",
            f"unet/{stem}.safetensors.index.json",
            f"unet/{stem}-00001-of-00002.safetensors",
            f"vae/{stem}.fp16.safetensors",
            "sd-pruned.safetensors",
        ]
    )
    BaseModel.find(MODEL).fetch()
    assert "unet/*.json" in downloads[0] and not any("safetensors" in pattern for pattern in downloads[0])
    assert downloads[1][0] == "text_encoder/model.safetensors"
    assert downloads[1][1:3] == [f"unet/{stem}.safetensors.index.json", f"unet/{stem}-*-of-*.safetensors"]
    assert downloads[1][-1] == f"vae/{stem}.fp16.safetensors"


def test_another_pipeline_is_refused_before_its_weights_are_downloaded(
    remote: Callable[..., list[list[str]]], snapshot: Path
) -> None:
    index = snapshot / "model_index.json"
    index.write_text(
        json.dumps({"_class_name": "LuminaPipeline", "transformer": ["diffusers", "LuminaNextDiT2DModel"]}),
        encoding="utf-8",
    )
    downloads = remote(["transformer/diffusion_pytorch_model.safetensors"])
    with pytest.raises(ValueError, match="is a LuminaPipeline, which is not supported: known are"):
        BaseModel.find(MODEL).fetch()
    assert len(downloads) == 1


def test_pickles_on_the_hub_are_refused_before_anything_is_downloaded(remote: Callable[..., list[list[str]]]) -> None:
    downloads = remote(["text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.bin"])
    with pytest.raises(ValueError, match=r"no model\.safetensors in text_encoder/ on the hub .*pytorch_model\.bin"):
        BaseModel.find(MODEL).fetch()
    assert not downloads
