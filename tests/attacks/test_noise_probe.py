from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_unlearn.attacks.base import AttackedModel
from lit_unlearn.attacks.noise_probe import NoiseProbe
from lit_unlearn.diffusion.base_model import BaseModel
from lit_unlearn.diffusion.ddim import DDIM
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.evaluation.metrics import wilson_interval

Attacked = Callable[..., AttackedModel]


class Numbered:
    """A judge whose answers are the given ones, in turn; it keeps the pictures."""

    name = "numbered"

    def __init__(self, answers: Sequence[float]) -> None:
        self.answers, self.seen = list(answers), list[Tensor]()

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        self.seen.append(images)
        return torch.tensor([self.answers.pop(0) for _ in images])


def test_the_best_try_is_kept_and_single_tries_are_told_as_well(
    attacked: Attacked, untouched: Callable[..., object]
) -> None:
    nan = float("nan")
    answers = [[0.1, 0.9, nan], [0.3, 0.2, nan], [0.2, 0.8, 0.0], [0.4, 0.6, nan]]  # tries by pictures
    model = attacked(judge=Numbered([answer for each in answers for answer in each]))
    probe = NoiseProbe(scales=(1.0, 2.0), tries=2)
    with untouched(model.pipeline):  # type: ignore[attr-defined]
        found = probe.run(model)
    pipeline, seen = model.pipeline, model.judge.seen  # type: ignore[attr-defined]
    pictures = found.draw(model.prompts, model.seeds)
    for place, best in enumerate((3, 0, 2)):
        assert torch.equal(pictures[place], seen[best][place])
    assert found.report["single_try"] == {"shown": 3 / 9, "interval": list(wilson_interval(3, 9)), "pictures": 9}
    by_scale = found.report["single_try_by_scale"]
    assert {name: (own["shown"], own["pictures"]) for name, own in by_scale.items()} == {
        "1.0": (1 / 4, 4),
        "2.0": (2 / 5, 5),
    }
    assert found.cost.unet_forwards == 4 * 3 * 2 * 2  # tries, pictures, guidance, steps
    # Each try has noise of its own in its steps, and begins where the picture without an attack does.
    condition = pipeline.guided(pipeline.encode(model.prompts).detach(), 4.0)
    for place, (scale, number) in enumerate([(1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1)]):
        generators = [seeded("noise_probe", seed, scale, number) for seed in model.seeds]
        drawn = DDIM(pipeline, 2).sample(condition, pipeline.initial_noise(model.seeds), 4.0, scale, generators)
        assert_close(seen[place], pipeline.decode(drawn), rtol=0, atol=1e-5)
    assert all((seen[0] - seen[i]).abs().max() > 1e-2 for i in (1, 2, 3))


@pytest.mark.parametrize("unrelated", [("one cat", "a castle"), ()])
def test_the_same_search_without_the_prompt_is_the_control(unrelated: tuple[str, ...], attacked: Attacked) -> None:
    class Bright(Numbered):
        def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
            self.seen.append(images)
            return images.mean(dim=(1, 2, 3))

    model = attacked(judge=Bright([]), unrelated=unrelated)
    found = NoiseProbe(tries=2).search(model)
    tries = torch.stack(model.judge.seen)  # type: ignore[attr-defined]
    model.judge.seen.clear()  # type: ignore[attr-defined]
    (name,) = found.controls
    assert name == ("unrelated prompts" if unrelated else "target prompts")
    drawn = found.controls[name](model.prompts, model.seeds)
    other = torch.stack(model.judge.seen)  # type: ignore[attr-defined]
    assert tries.shape == other.shape == (6, 3, 3, 16, 16)
    best = other.mean(dim=(2, 3, 4)).max(dim=0).values
    assert torch.equal(drawn.mean(dim=(1, 2, 3)), best)
    assert (tries - other).abs().amax(dim=(2, 3, 4)).min() > 1e-3
    prompts = [unrelated[i % 2] for i in range(3)] if unrelated else ["one soccer ball"] * 3
    same = NoiseProbe(tries=2)._best(model)(prompts, model.seeds)
    assert torch.equal(drawn, same)


def test_no_answers_at_all(attacked: Attacked) -> None:
    model = attacked(judge=Numbered([float("nan")] * 3), num_pictures=1)
    found = NoiseProbe().search(model)
    assert found.report["single_try"] == {"shown": None, "interval": [0.0, 1.0], "pictures": 0}


def test_its_sampler_is_asked_about_the_steps() -> None:
    base = BaseModel.find("emoji-sd")
    NoiseProbe().check_run(base, 8, 4.0)
    with pytest.raises(ValueError, match="num_inference_steps=2000 cannot be used with the model's DDIMScheduler"):
        NoiseProbe().check_run(base, 2000, 4.0)
