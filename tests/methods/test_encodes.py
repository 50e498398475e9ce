"""How often prompts are encoded by null-space edits without descent, and that what is kept changes no bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from helpers import LAYERS, by_null_space
from lit_unlearn.methods.shared import layer_state
from lit_unlearn.methods.shared.text_layers import unmoved_layers
from lit_unlearn.methods.unet_value_refinement import UNetValueRefinement
from lit_unlearn.methods.value_refinement import ValueRefinement

Refinement = Callable[..., ValueRefinement]
Fit = Callable[..., L.Trainer]


@contextmanager
def encodes(module: ValueRefinement) -> Iterator[list[int]]:
    """Numbers of prompts in the calls of the text encoder."""
    found: list[int] = []

    def record(encoder: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.append(len(args[0] if args else kwargs["input_ids"]))

    module.configure_model()
    handle = module.text_encoder.register_forward_pre_hook(record, with_kwargs=True)
    yield found
    handle.remove()


@pytest.mark.parametrize(("values", "of_pairs"), [("target", 2), ("residual", 1 + 1 + 2)])
def test_the_only_edited_layer_reads_its_prompts_once_for_all_rounds(
    values: str, of_pairs: int, refinement: Refinement, fit: Fit
) -> None:
    module = refinement(values=values, first_layer=-1, rounds=3)
    with encodes(module) as found:
        fit(module, by_null_space(), steps=1)
    # Edit prompts and target prompts; the stream of residual in two further rounds. Retained prompts before and after.
    assert sum(found) == of_pairs * module.num_pairs + 2 * len(module.retain_prompts)
    assert not hasattr(module, "goal")


def test_layers_behind_an_edited_one_read_their_prompts_in_every_round(refinement: Refinement, fit: Fit) -> None:
    module = refinement(values="target", first_layer=1, rounds=2)
    with encodes(module) as found:
        fit(module, by_null_space(), steps=1)
    assert module.edited_names == LAYERS and unmoved_layers(module.edited_names) == {LAYERS[0]}
    # Two lists of pairs: of the first layer once, of the second in each of two rounds.
    assert sum(found) == 2 * (1 + 2) * module.num_pairs + 2 * len(module.retain_prompts)


def test_a_layer_with_two_edited_weights_keeps_nothing(refinement: Refinement) -> None:
    module = refinement(edited_parameters=r"mlp\.fc\d\.weight", values="target", first_layer=2, rounds=2)
    module.configure_model()
    assert len(module.edited_names) == 2 and unmoved_layers(module.edited_names) == set()


@pytest.mark.parametrize("kind", [ValueRefinement, UNetValueRefinement])
@pytest.mark.parametrize("positions", ["all", "content"])
def test_what_is_kept_changes_no_bit(
    kind: type[ValueRefinement], positions: str, refinement: Refinement, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights() -> dict[str, Tensor]:
        own = {"first_layer": 1} if kind is ValueRefinement else {"watched_prompts": 1}
        module = refinement(kind, values="target", rounds=2, positions=positions, **own)
        fit(module, by_null_space(), steps=1)
        named = module.pipeline.named_parameters()
        return {name: named[name].detach().clone() for name in module.edited_names}

    kept = weights()
    monkeypatch.setattr(layer_state, "MOST_KEPT_BYTES", 0)
    monkeypatch.setattr(layer_state.LayerState, "edited_keys", property(lambda state: state.edited(state.keys).clone()))
    anew = weights()
    assert kept.keys() == anew.keys()
    assert all(torch.equal(kept[name], anew[name]) for name in kept)
