"""What the closed forms share that map text states to other values in the UNet's cross-attention (UCE, SPEED)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.one_step import OneStepEditor


class CrossAttentionEditor(OneStepEditor, ClosedFormMethod):
    """Prepares a closed form; a ``CrossAttentionEdit`` callback solves it at the end of the only epoch.

    The inputs of ``attn2.to_k`` and ``attn2.to_v`` are the text encoder's states, the same for all of them: they are
    gathered once.

    Args:
        edited_parameters: Group or pattern of weights of ``attn2.to_k`` and ``attn2.to_v``.
        **kwargs: See ``ConceptEditor``.
    """

    def __init__(self, edited_parameters: str = "xattn-kv", **kwargs: object) -> None:
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights of ``attn2.to_k`` and ``attn2.to_v`` that the pattern selects.

        Raises:
            ValueError: It selects another weight.
        """
        why = ": this method edits only weights of attn2.to_k and attn2.to_v; choose xattn-kv or a pattern within it."
        return self.select_only(names, lambda name: name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")), why)

    def configure_model(self) -> None:
        """Load the pipeline and find the layers."""
        if hasattr(self, "pipeline"):
            return
        super().configure_model()
        self.layers = self.pipeline.sites(self.edited_names)

    def written_epochs(self) -> int:
        """All that there were: an epoch has one step, and its edit is written with it."""
        return self.current_epoch

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """``input_ids`` (n, L) and the states (n, L, D), float32, of ``prompts``, the keys of all edited layers."""
        tokens = self.pipeline.tokenize(prompts)
        return tokens.ids[0], self.pipeline.encode_many(tokens).states.float()
