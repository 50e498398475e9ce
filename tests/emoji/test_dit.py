"""The second embedded model: its text encoders, its transformer, and the folder that diffusers draws with."""

from __future__ import annotations

import json
import os
import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import T5Tokenizer

from helpers import CONFIGS
from lit_unlearn import cli
from lit_unlearn.data.concepts import load_concept_set
from lit_unlearn.data.prompts import Pictures
from lit_unlearn.emoji import dit_data
from lit_unlearn.emoji.captions import vocabulary
from lit_unlearn.emoji.dit import DiTTraining, draw
from lit_unlearn.emoji.dit_data import CaptionedLatents, DiTDrawings
from lit_unlearn.emoji.dit_text import ENCODERS, MAX_LENGTH, CaptionDataset, Captions, DiTTextTraining, t5_tokenizer
from lit_unlearn.emoji.drawing import ATTRIBUTES
from lit_unlearn.system.run_file import read_run

TINY: dict[str, Any] = {"hidden_sizes": (16, 32, 64), "depths": (2, 3, 2), "attention_heads": (2, 2, 2)}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.precision=32-true"]
SMALL = [*QUIET, "--model.num_layers=2", "--model.num_heads=2", "--model.attention_head_dim=8"]
SMALL += ["--data.batch_size=2", "--data.steps_per_epoch=2", "--data.drawings=1", "--data.captions=2"]
SMALL += ["--data.prompts_per_kind=0", "--trainer.max_steps=4", "--model.text_encoders=text"]


@pytest.fixture(scope="module")
def texts() -> DiTTextTraining:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiTTextTraining(**TINY).eval()


@pytest.fixture
def folder(texts: DiTTextTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a run ``text`` of untrained encoders; drawings are of eight combinations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(CONFIGS.parent / "checkpoints")
    (tmp_path / "text/pretrained").mkdir(parents=True)
    texts.save_pretrained(tmp_path / "text/pretrained")
    few = {"subject": ATTRIBUTES["subject"][:2], "style": ATTRIBUTES["style"], "scene": ATTRIBUTES["scene"][:1]}
    monkeypatch.setattr(dit_data, "ATTRIBUTES", few)
    return tmp_path


def module_of(folder: Path, **given: Any) -> DiTTraining:
    torch.manual_seed(0)
    return DiTTraining(text_encoders=str(folder / "text"), num_layers=2, num_heads=2, attention_head_dim=8, **given)


def test_every_word_is_one_token_of_t5_and_others_are_spelled(tmp_path: Path) -> None:
    tokenizer = t5_tokenizer()
    assert all(tokenizer.tokenize(word) == [f"▁{word}"] for word in vocabulary())
    assert "".join(tokenizer.tokenize("Zebras, unicycle")) == "▁Zebras,▁unicycle"
    assert tokenizer.unk_token_id not in tokenizer("Zebras, unicycle").input_ids
    tokenizer.save_pretrained(tmp_path)
    loaded = T5Tokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == MAX_LENGTH
    for text in ("", "a dog at sunset", "Zebras, unicycle"):
        expected = tokenizer(text, padding="max_length", max_length=MAX_LENGTH).input_ids
        assert loaded(text, padding="max_length", max_length=MAX_LENGTH).input_ids == expected
        assert expected.count(tokenizer.eos_token_id) == 1 and len(expected) == MAX_LENGTH


def test_captions_and_prompts_fit(texts: DiTTextTraining) -> None:
    data, concepts = CaptionDataset(2000, "train"), load_concept_set("emoji20").concepts.values()
    prompts = [data[i]["captions"] for i in range(len(data))]
    prompts += [prompt for one in concepts for prompt in (*one.prompts, *one.edit_prompts, *one.target_prompts)]
    for tokenizer in texts.tokenizers:
        assert max(len(ids) for ids in tokenizer(prompts).input_ids) <= MAX_LENGTH


def test_the_heads_read_what_the_pipeline_reads(texts: DiTTextTraining, folder: Path) -> None:
    prompts = ["a dog", "a glossy cat at sunset", ""]
    pipeline = module_of(folder).pipeline()
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_LENGTH
        )
        read = texts.read(prompts)
    assert states.shape == (3, 2 * MAX_LENGTH, 64) and pooled.shape == (3, 48)
    ends = torch.tensor([3, 6, 1])
    rows = torch.arange(3)
    clip, t5 = states[rows, ends], states[rows, MAX_LENGTH + ends - 1]
    # The saved encoders are in half precision.
    for name, found in (
        ("text_encoder/state", clip[:, :16]),
        ("text_encoder_2/state", clip[:, 16:48]),
        ("text_encoder_3/state", t5),
        ("text_encoder/pooled", pooled[:, :16]),
        ("text_encoder_2/pooled", pooled[:, 16:]),
    ):
        torch.testing.assert_close(read[name], found, rtol=0, atol=2e-2)
        assert read[name].std() > 0.1
    assert not clip[:, 48:].any()


def test_training_the_encoders_learns_what_the_labels_say() -> None:
    torch.manual_seed(0)
    module = DiTTextTraining(**TINY)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    data = CaptionDataset(32, "train")
    batch = torch.utils.data.default_collate([data[i] for i in range(32)])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for step in range(25):
        loss = module.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_splits_of_captions_differ() -> None:
    data = Captions(batch_size=4, steps_per_epoch=2, num_validation=8)
    assert [data.train[i]["captions"] for i in range(8)] != [data.validation[i]["captions"] for i in range(8)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_sizes": (16, 32, 40)}, r"the last, of T5, must be at least 48"),
        ({"depths": (1, 2, 2)}, "the second-last layer of CLIP is read, so give it at least 2"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTTextTraining(**{**TINY, **given})


def test_wrong_arguments_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"text_encoders is missing: give the folder of a run of emoji/dit_text.yaml"):
        DiTTraining()
    with pytest.raises(ValueError, match="the run none has no text_encoder "):
        DiTTraining(text_encoders="none")
    with pytest.raises(ValueError, match="minutes=0 must be positive"):
        module_of(folder, minutes=0)
    with pytest.raises(ValueError, match="style_weights names cubist: the styles are cartoon"):
        DiTDrawings(style_weights={"cubist": 2})
    with pytest.raises(ValueError, match="encodes with the parts of DiTTraining"):
        DiTDrawings().setup("fit")


def test_a_finished_transformer_is_trained_further(folder: Path) -> None:
    first = module_of(folder)
    first.save_pretrained(folder / "first")
    sizes = {"num_layers": 2, "num_heads": 2, "attention_head_dim": 8}
    further = DiTTraining(start=str(folder / "first"), **sizes)
    for name, value in first.transformer.state_dict().items():
        assert torch.equal(further.transformer.state_dict()[name], value.half().float()), name
    saved = load_file(folder / "text/pretrained/text_encoder_3/model.safetensors")
    assert torch.equal(
        load_file(further.parts["text_encoder_3"] / "model.safetensors")["shared.weight"], saved["shared.weight"]
    )
    with pytest.raises(ValueError, match="a transformer with num_layers=2, and this one has 3: set the"):
        DiTTraining(start=str(folder / "first"), **{**sizes, "num_layers": 3})
    with pytest.raises(ValueError, match=r"text_encoders='text' beside start='first': .* give one of the two"):
        DiTTraining(text_encoders="text", start="first")
    with pytest.raises(ValueError, match=r"start='emoji-sd' has no text_encoder_2 .* give emoji-dit, or a"):
        DiTTraining(start="emoji-sd")
    with pytest.raises(ValueError, match="model='first' beside start='first', which has an autoencoder of its own"):
        DiTTraining(model="first", start="first")
    assert further.parts["vae"] == folder / "first/vae"


def test_pairs_are_drawn_by_weight_and_lose_what_they_should() -> None:
    latents = torch.arange(2.0).view(2, 1, 1, 1, 1)
    states = torch.ones(2, 3, 4, 5)

    def pairs(**given: float) -> dict[str, torch.Tensor]:
        shares = {"empty_share": 0.0, "without_t5_share": 0.0, **given}
        empty = torch.full((4, 5), 7.0), torch.full((6,), 7.0)
        weights = torch.tensor([1.0, 3.0])
        data = CaptionedLatents(latents, states, torch.ones(2, 3, 6), empty, weights, **shares, t5_length=1)
        return data.pairs(400, torch.Generator().manual_seed(0))

    plain = pairs()
    assert 0.65 < plain["latents"].mean() < 0.85
    assert plain["states"].eq(1).all() and plain["noise"].shape == (400, 1, 1, 1)
    empty = pairs(empty_share=1.0)
    assert empty["states"].eq(7).all() and empty["pooled"].eq(7).all()
    cut = pairs(without_t5_share=1.0)["states"]
    assert cut[:, :3].eq(1).all() and cut[:, 3:].eq(0).all()
    some = pairs(empty_share=0.3)["states"][:, 0, 0].eq(7).float().mean()
    assert 0.2 < some < 0.4
    assert states.eq(1).all()


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pretrained/transformer/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("how", ["killed", "told"])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    how: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "--config", "emoji/dit.yaml", *SMALL]
    assert cli.main([*command, "--trainer.default_root_dir=whole"]) == 0
    step = DiTTraining.training_step

    def stop(module: DiTTraining, batch: Any, batch_idx: int) -> torch.Tensor:
        if how == "killed" and module.global_step == 3:  # goes on from the end of the first epoch
            raise KeyError("killed")
        if how == "told" and module.global_step == 2:  # goes on within the second epoch
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(DiTTraining, "training_step", stop)
    if how == "killed":
        with pytest.raises(KeyError, match="killed"):
            cli.main(command)
    else:
        assert cli.main(command) == cli.TOLD_TO_STOP
    run = Path("logs/emoji/dit/version_0")
    assert read_run(run)["state"] == "running" and not (run / "pretrained").exists()
    monkeypatch.setattr(DiTTraining, "training_step", step)
    capsys.readouterr()
    assert cli.main(command) == 0
    assert f"Going on with {run}" in capsys.readouterr().out
    assert read_run(run)["state"] == "finished"
    found, expected = weights_of(run), weights_of(Path("whole/emoji/dit/version_0"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    # Once it is finished, the same command with --once does nothing.
    assert cli.main([*command, "--once"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    # A longer one goes on from its end.
    assert cli.main([*command, "--ckpt_path=last", "--trainer.max_steps=6"]) == 0
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


def test_a_training_ends_when_its_time_is_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "emoji/dit.yaml", *SMALL, "--model.minutes=1e-9"]) == 0
    run = Path("logs/emoji/dit/version_0")
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 1 and state["seconds"] > 0
    assert read_run(run)["state"] == "finished" and (run / "pretrained/model_index.json").is_file()


def test_the_learning_rate_goes_by_steps_or_by_time_whichever_is_further(folder: Path) -> None:
    module = module_of(folder, minutes=10, lr=1.0)
    module._trainer = SimpleNamespace(estimated_stepping_batches=1000)  # type: ignore[assignment]
    factor = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]  # type: ignore[index]
    assert factor(0) == pytest.approx(0.01) and factor(500) == pytest.approx(0.5)
    module.seconds = 450.0
    assert factor(500) == pytest.approx((1 - 0.5**0.5) / 2)
    module.seconds = 600.0
    assert factor(500) == pytest.approx(0)


def test_diffusers_draws_the_saved_folder_as_the_formulas_say(folder: Path) -> None:
    module = module_of(folder).eval()
    with torch.no_grad():  # a transformer begins with a last layer that hardly depends on the prompt
        for weight in module.transformer.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
        for value in module.transformer.state_dict().values():  # the position embedding too
            value.copy_(value.half())
    module.save_pretrained(folder / "dit")
    assert sum(file.stat().st_size for file in (folder / "dit").rglob("*")) < 40e6
    index = json.loads((folder / "dit/model_index.json").read_text(encoding="utf-8"))
    assert index["text_encoder_3"] == ["transformers", "T5EncoderModel"]
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "dit")
    for name in (*ENCODERS, "transformer", "vae"):
        assert getattr(pipeline, name).dtype == torch.float32
    half = load_file(folder / "dit/text_encoder_3/model.safetensors")
    assert all(weight.dtype == torch.float16 for weight in half.values())

    prompts, steps, guidance = ["a dog", "an ink sketch cat in the rain"], 4, 4.0
    found = draw(pipeline, prompts, [3, 4], steps, guidance)
    own = module.pipeline()
    with torch.no_grad():
        states, empty, pooled, nothing = own.encode_prompt(prompts, None, None, max_sequence_length=module.t5_length)
        x = torch.cat([torch.randn(1, 6, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
        sigmas = [*torch.linspace(1, 1e-3, steps).tolist(), 0.0]
        for sigma, after in pairwise(sigmas):
            t = torch.full((2,), sigma * 1000)
            given = module.transformer(x, states, pooled, t).sample
            free = module.transformer(x, empty, nothing, t).sample
            x = x + (after - sigma) * (free + guidance * (given - free))
        expected = (own.vae.decode(x / own.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    other = draw(pipeline, ["an owl", "a castle at sunset"], [3, 4], steps, guidance)
    assert (found - other).abs().max() > 1e-2
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)


def test_pictures_are_judged_for_the_curve(folder: Path) -> None:
    module = module_of(folder, num_inference_steps=1).eval()
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    shown: list[str] = []
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)
    module.trainer = trainer
    experiment = type("E", (), {"add_image": lambda _, name, row, step: shown.append(f"{name} {tuple(row.shape)}")})()
    trainer.loggers = [type("Logger", (), {"experiment": experiment})()]  # type: ignore[list-item]
    items = Pictures(load_concept_set("emoji20"), 1, 0, 1).items[:4]
    module.on_validation_epoch_start()
    with torch.no_grad():
        module.validation_step(items, 0)
    module.on_validation_epoch_end()
    assert logged.keys() == {f"validation/{name}" for name in ("direct", "indirect", "concept/apple", "concept/lemon")}
    assert all(0 <= value <= 1 for value in logged.values())
    assert shown == ["samples/0 (3, 48, 192)"]
