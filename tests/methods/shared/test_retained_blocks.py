"""Retained keys of layers in the denoiser's blocks, which are not all held at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import FF, by_least_squares, by_null_space, load_copy, weights
from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.thin import ThinMoment
from lit_unlearn.diffusion.hooks import capture_inputs
from lit_unlearn.methods.shared import moments
from lit_unlearn.methods.shared.moments import MomentSums
from lit_unlearn.methods.shared.retained_blocks import RetainedBlocks
from lit_unlearn.methods.shared.unet_layers import places_in_block
from lit_unlearn.methods.unet_value_refinement import UNetFeedForwardRefinement

Build = Callable[..., Any]

KEYS = 2 * 2 * 2 * 16
"""Two retained prompts at two noises, and the empty one at each of them, at 16 places: as many keys as inputs."""


@pytest.fixture
def edit(refinement: Build) -> Build:
    """Makes an edit of the FFN of ``tiny_sd`` in two rounds, without descent."""
    return partial(
        refinement,
        UNetFeedForwardRefinement,
        values="target",
        rounds=2,
        watched_prompts=2,
        noises_per_prompt=2,
        noises_per_retained_prompt=2,
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RetainedBlocks]:
    """What has gathered the retained keys, once for each pass."""
    found: list[RetainedBlocks] = []
    read = RetainedBlocks.read_share

    def recording(blocks: RetainedBlocks, *args: Any) -> None:
        found.append(blocks)
        read(blocks, *args)

    monkeypatch.setattr(RetainedBlocks, "read_share", recording)
    return found


@pytest.mark.parametrize(
    "solver", [partial(by_null_space, rule="soft", ridge=None, threshold=0.1), partial(by_least_squares, ridge=1.0)]
)
def test_groups_give_the_same_bits_for_a_pass_each(
    solver: Build,
    edit: Build,
    fit: Build,
    asked: list[RetainedBlocks],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = edit()
    fit(whole, solver(), steps=1, max_epochs=2 * len(FF))
    assert len(asked) == 1 and whole.retained.keys() == set(FF)
    assert {(own.count, type(own.moment)) for own in whole.retained.values()} == {(KEYS, Tensor)}
    assert asked[0].queries == []  # no further pass needs them

    monkeypatch.setattr(moments, "MOST_HELD_BYTES", 2 * 16 * 128**2)
    pairs = edit()
    with caplog.at_level(logging.INFO):
        fit(pairs, solver(), steps=1, max_epochs=2 * len(FF))
    assert len(asked) == 1 + 2 * 2 and pairs.retained.keys() == set(FF[2:])
    assert pairs.retained_items == 8
    assert pairs.forwards.count == whole.forwards.count + 3 * 8
    assert (
        "layers are taken in 2 groups, which takes 2 passes over the retained prompts in each round, each of 8 "
        "forwards of the denoiser, instead of one for all rounds" in caplog.text
    )
    found, expected = weights(pairs), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert whole.pretrained.change_ratio() > 1e-3
    for name, report in whole.report["layers"].items():
        assert pairs.report["layers"][name] == pytest.approx(report, rel=1e-6, abs=1e-9)
    for entry in ("spectrum", "cutoffs", "retained_state_drift"):
        assert pairs.report.get(entry) == whole.report.get(entry)


def test_moments_are_those_of_all_inputs(edit: Build, fit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    queries: list[Any] = []
    read = RetainedBlocks.read_share

    def keep(blocks: RetainedBlocks, *args: Any) -> None:
        queries.extend(make() for make in blocks.queries)
        read(blocks, *args)

    monkeypatch.setattr(RetainedBlocks, "read_share", keep)
    module = edit()
    fit(module, by_null_space(), steps=1)
    expected = {name: torch.zeros(128, 128, dtype=torch.float64) for name in FF}
    with module.pretrained.restored(), torch.no_grad():
        for query in queries:
            with capture_inputs(module.layers) as captured:
                module.pipeline.predict(*query)
            for name, keys in captured.items():
                expected[name] += second_moment(keys.flatten(0, 1))
    for name in FF:
        assert torch.equal(module.retained[name].moment, expected[name])


def test_few_keys_are_kept_instead_of_moments(edit: Build, fit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many keys as inputs; a bound that these fit in, so that one pass is enough."""
    changes: list[list[Tensor]] = []

    def fitted() -> Any:
        module, solver = edit(noises_per_retained_prompt=1), by_null_space(rule="soft", ridge=None, threshold=0.1)
        own: list[Tensor] = []
        changes.append(own)
        solve = solver.solver.solve
        monkeypatch.setattr(
            solver.solver, "solve", lambda writes: [own.append(one.change) or one for one in solve(writes)]
        )
        fit(module, solver, steps=1, max_epochs=2 * len(FF))
        return module

    whole = fitted()
    monkeypatch.setattr(moments, "MOST_HELD_BYTES", len(FF) * 16 * 128**2 // 2)
    thin = fitted()
    assert thin.forwards.count == whole.forwards.count
    for name in FF:
        assert isinstance(thin.retained[name].moment, ThinMoment)
        assert_close(thin.retained[name].moment.dense, whole.retained[name].moment, rtol=1e-8, atol=1e-10)
        assert thin.retained[name].count == whole.retained[name].count == KEYS // 2
    dense, few = changes
    assert len(few) == len(dense) == 2 * len(FF)
    assert float((few[0] - dense[0]).norm() / dense[0].norm()) < 1e-8  # later ones start from rounded weights
    for one, other in zip(few, dense, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4


def test_inputs_of_one_layer_at_a_time(edit: Build, fit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    add = MomentSums.add

    def record(sums: MomentSums, name: str, keys: Tensor) -> None:
        taken.append(name)
        add(sums, name, keys)

    monkeypatch.setattr(MomentSums, "add", record)
    fit(edit(), by_null_space(), steps=1)
    assert taken == [*FF, *FF]  # as they run: the retained prompts at their noises, and the empty one


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_sd3_without_t5", "tiny_pixart"])
def test_positions_of_layers_in_blocks(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(family)
    pipeline: Any = load_copy(folder, torch.float32)
    names = [
        name
        for name in pipeline.named_parameters()
        if name.startswith(f"{pipeline.denoiser_part}.")
        and name.endswith(("ff.net.2.weight", "attn.add_k_proj.weight", "attn.add_v_proj.weight"))
    ]
    condition = pipeline.encode(["a dog"])
    with capture_inputs(pipeline.sites(names)) as captured, torch.no_grad():
        pipeline.predict(torch.zeros(1, *pipeline.latent_shape), torch.tensor([10]), condition)
    assert names and {name: keys.shape[1] for name, keys in captured.items()} == {
        name: places_in_block(pipeline, name, condition.states.shape[1]) for name in names
    }
