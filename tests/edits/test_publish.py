"""What is sent to the Hub, to a stand-in of its HTTP API: nothing leaves this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load as load_weights

import lit_unlearn as lu
from helpers import LAYERS, edit_content, files
from lit_unlearn import cli

TOKEN = "hf_of_the_test"


class StandIn(ThreadingHTTPServer):
    """Answers as the Hub does, and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.summaries: list[str] = []
        self.token: dict[str, Any] = {"role": "write"}


class Answers(BaseHTTPRequestHandler):
    """The few calls of the API that an upload needs."""

    server: StandIn

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, content: Any, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path.startswith("/api/whoami"):
            self.answer(200, {"name": "you", "type": "user", "auth": {"accessToken": self.server.token}})
        elif name in self.server.repositories:
            self.answer(200, {"id": name, "_id": "1", "siblings": [], "tags": [], "downloads": 0, "likes": 0})
        else:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'you'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.server.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": "1"})
            return
        if self.path == "/api/validate-yaml":  # of the card
            self.answer(200, {"errors": [], "warnings": []})
            return
        name, _, call = self.path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if call == "preupload":
            asked = json.loads(body)["files"]
            kinds = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            self.answer(200, {"files": kinds})
        elif call == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.summaries.append(line["value"]["summary"])
                else:
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[name][line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/{name}/commit/1"
            self.answer(200, {"success": True, "commitOid": "1", "commitUrl": url})
        else:
            self.answer(404, {"error": f"no {self.path}"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for module in (huggingface_hub.constants, huggingface_hub.hf_api.constants):
        monkeypatch.setattr(module, "ENDPOINT", address)
        monkeypatch.setattr(module, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with an edit, and the pictures of its test."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text('{"state": "finished"}', encoding="utf-8")
    content = edit_content(tiny_sd, lambda value: value + 0.5, arguments={"concept_set": "emoji20"})
    torch.save(content, folder / "checkpoints/last.ckpt")
    Image.new("RGB", (8, 8), "red").save(folder / "grid.png")
    return folder


def export(run: Path, *options: str) -> int:
    return cli.main(["export", "--ckpt_path", str(run / "checkpoints/last.ckpt"), "-o", "out", *options])


def card_of(repository: dict[str, bytes]) -> tuple[dict[str, Any], str]:
    """Fields and text of a card."""
    _, fields, text = repository["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(fields), text


def test_a_folder_is_uploaded_with_card_licence_and_pictures(
    hub: StandIn, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, "--push_to_hub", "you/tiny-dog", "--license", "openrail") == 0
    repository = hub.repositories["you/tiny-dog"]
    assert set(repository) == files(Path("out")) | {"grid.png"}
    for name, content in repository.items():
        if name not in ("README.md", "grid.png"):
            assert content == Path("out", name).read_bytes()
    assert repository["grid.png"] == (run / "grid.png").read_bytes()
    fields, text = card_of(repository)
    assert fields["license"] == "openrail"
    assert "(grid.png)" in text
    assert 'from_pretrained("you/tiny-dog")' in text
    assert str(run) not in text
    assert hub.private == {"you/tiny-dog": False}
    assert hub.summaries == ["Add an edit of dog as folder"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("/you/tiny-dog: uploaded")


def test_a_delta_has_a_card_that_says_how_to_load_it(
    hub: StandIn, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "grid.png").unlink()
    assert export(run, "--delta", "--push_to_hub", "you/dog-delta", "--private") == 0
    repository = hub.repositories["you/dog-delta"]
    assert set(repository) == {"delta.safetensors", "README.md"}
    assert sorted(load_weights(repository["delta.safetensors"])) == sorted(LAYERS)
    fields, text = card_of(repository)
    assert "license" not in fields
    assert 'hf_hub_download("you/dog-delta", "delta.safetensors")' in text
    assert hub.private == {"you/dog-delta": True}
    said = capsys.readouterr().err
    assert "no licence field: pass --license" in said
    assert "no example pictures" in said


@pytest.mark.parametrize("form", [["--lora", "auto"]])
def test_lora_weights_name_their_base(hub: StandIn, run: Path, form: list[str]) -> None:
    assert export(run, *form, "--push_to_hub", "you/dog-lora") == 0
    _, text = card_of(hub.repositories["you/dog-lora"])
    assert 'pipeline.load_lora_weights("you/dog-lora")' in text


def test_what_exists_is_only_added_to_if_asked(hub: StandIn, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["you/dog"] = {"README.md": b"mine"}
    assert export(run, "--delta", "--push_to_hub", "you/dog") == 2
    assert "push_to_hub=you/dog exists on the Hub: choose another name, or pass --overwrite" in capsys.readouterr().err
    assert hub.repositories["you/dog"] == {"README.md": b"mine"}
    assert not Path("out").exists()
    assert export(run, "--delta", "--push_to_hub", "you/dog", "--overwrite", "--private") == 2
    assert "push_to_hub=you/dog exists, and --private is for a new repository" in capsys.readouterr().err
    assert hub.repositories["you/dog"] == {"README.md": b"mine"}
    assert export(run, "--delta", "--push_to_hub", "you/dog", "--overwrite") == 0
    assert set(hub.repositories["you/dog"]) == {"README.md", "delta.safetensors", "grid.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push_to_hub", "a b/c"], "push_to_hub='a b/c' is no name of a repository"),
        (["--push_to_hub", "dog"], "push_to_hub='dog' does not say whose repository it is: give OWNER/NAME."),
        (["--private"], "--private is for --push_to_hub OWNER/NAME"),
        (["--license", "openrail"], "--license is for --push_to_hub OWNER/NAME"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(
    options: list[str], message: str, hub: StandIn, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, *options) == 2
    assert message in capsys.readouterr().err
    assert hub.repositories == {} and not Path("out").exists()


def test_without_a_right_to_write_nothing_is_exported(
    hub: StandIn, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert export(run, "--push_to_hub", "you/dog") == 2
    assert "push_to_hub=you/dog: the token is not valid: run hf auth login." in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("lit_unlearn.edits.publish.get_token", lambda: None)
    assert export(run, "--push_to_hub", "you/dog") == 2
    assert "push_to_hub needs a token" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_token_that_may_only_read_is_told_before_a_model_is_loaded(
    hub: StandIn, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.token = {"role": "read"}
    assert export(run, "--push_to_hub", "you/dog") == 2
    reason = "push_to_hub=you/dog: the token may only read: take one with the right to write."
    assert capsys.readouterr().err == f"lit-unlearn: error: {reason}\n"
    assert hub.repositories == {} and not Path("out").exists()
    hub.token = {"role": "fineGrained", "fineGrained": {"scoped": []}}
    assert export(run, "--delta", "--push_to_hub", "you/dog") == 0


def test_the_api_uploads_as_the_command_does(
    hub: StandIn, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, "--delta", "--push_to_hub", "you/dog", "--private", "--license", "openrail") == 0
    command = hub.repositories["you/dog"]
    capsys.readouterr()
    path = lu.export(
        run, "other", format="delta", push_to_hub="you/other", private=True, license="openrail", overwrite=True
    )
    assert path == Path("other/delta.safetensors")
    assert capsys.readouterr().out.endswith("/you/other: uploaded\n")
    own = hub.repositories["you/other"]
    assert own.pop("README.md").decode() == command.pop("README.md").decode().replace("you/dog", "you/other")
    assert own.keys() == command.keys() == {"delta.safetensors", "grid.png"}
    mine, theirs = (load_weights(repository["delta.safetensors"]) for repository in (own, command))
    assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert hub.private == {"you/dog": True, "you/other": True}
    refused = {
        "push_to_hub='dog' does not say whose repository it is": {"push_to_hub": "dog"},
        "push_to_hub=you/dog exists on the Hub": {"push_to_hub": "you/dog"},
        "--private is for --push_to_hub OWNER/NAME": {"private": True},
        "--license is for --push_to_hub OWNER/NAME": {"license": "openrail"},
    }
    monkeypatch.setattr("lit_unlearn.edits.forms.read_edit", None)  # nothing is read before
    for message, arguments in refused.items():
        with pytest.raises(lu.UserError, match=message):
            lu.export(run, "third", **arguments)
    assert not Path("third").exists()


def test_a_hub_that_cannot_be_reached_is_told(
    hub: StandIn, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (huggingface_hub.constants, huggingface_hub.hf_api.constants):
        monkeypatch.setattr(module, "ENDPOINT", "http://127.0.0.1:9")
    assert export(run, "--push_to_hub", "you/dog") == 2
    assert "the Hub cannot be reached" in capsys.readouterr().err
    assert not Path("out").exists()
