"""A null-space edit of what reads text first that resists learned tokens: it attacks itself and closes what it finds.

Data flow: one epoch is one round. Every round solves anew from the pretrained weights, for all layers at once: the
states of the edit prompts (K1) get the outputs of the target prompts' states (V1 = W K1*). In every round after the
first a token is learned for each concept, on the model as the round before has left it and from pictures by the
unedited model; it stands in for the concept's name. At the end of the epoch the states of the named edit prompts, with
that token, become further keys, with the same targets. All edited layers of a way have the same keys, and no edit
moves them.

The layers are K and V of a UNet's cross-attention, or the maps of ``context`` in any family: these read what the text
encoders give on up to two ways, as states and as a pooled vector (``text_ways``), and each way has keys, retained
inputs and a solve of its own. A learned token is new in all text encoders; its prompts give keys on each way.

Styles and scenes are also edited in the empty prompt ("guidance edit"). A picture has some style, also if no word asks
for one, so a token can bring a style back as "none of the others". Classifier-free guidance pushes away from the empty
prompt's prediction. With the concept's direction added to the empty prompt's values, it pushes away from the concept,
as a negative prompt does. Where guidance does not lead away from the empty prompt (from zeros in Stable Diffusion XL,
from nothing in FLUX.1) there is no such edit, and the fit says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_unlearn.core.alignment import align_tokens, from_first_difference, positions_mask
from lit_unlearn.core.closed_form import second_moment
from lit_unlearn.core.reach import largest_norm
from lit_unlearn.core.solvers import Retained, Write
from lit_unlearn.data.concepts import Concept
from lit_unlearn.data.fit_plan import FitPlan
from lit_unlearn.data.pairs import ATTRIBUTES
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.new_tokens import PLACE
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.diffusion.text import Tokens
from lit_unlearn.methods.forget_me_not import templates_of
from lit_unlearn.methods.shared.closed_form import ClosedFormMethod
from lit_unlearn.methods.shared.concept_editor import pairs_of
from lit_unlearn.methods.shared.reference_images import ReferenceImages
from lit_unlearn.methods.shared.text_layers import taken
from lit_unlearn.methods.shared.text_maps import by_way, flattened, select_first_maps
from lit_unlearn.system.devices import for_solving


@dataclass(frozen=True, eq=False)
class TokenPrompts:
    """The named edit prompts of a concept with a learned token instead of its name.

    Attributes:
        tokens: Tokens of the n prompts, with one learned token each.
        targets: Tokens of their target prompts.
    """

    tokens: Tokens
    targets: Tokens


class RobustErasure(ClosedFormMethod, ReferenceImages):
    """Edits keys and values of the cross-attention, or all maps that read text first, in rounds of attack and edit.

    Args:
        rounds: Rounds of attack after the first edit; 0 only edits, which takes a second.
        found_weight: Weight of the keys that attacks have found, relative to those of the edit prompts; several
            concepts share it, since what retains does not grow with them.
        found_prompts: Largest number of named edit prompts of each concept in which a learned token is used.
        guidance_edit: How far the empty prompt's values move towards each style and scene, in units of the distance
            between edit and target prompts at the positions after the text; 0 leaves the empty prompt as it is. It is
            otherwise retained, with the weight of all retained prompts together. Without effect where guidance does
            not lead away from the empty prompt.
        retain: Further prompts to retain, besides the edit prompts of the set's other concepts.
        seed: Seed of the attacks: initial tokens, pictures, timesteps and noise.
        optimizer: Optimizer of the learned tokens, reset in each round.
        edited_parameters: Group or pattern of the first linear maps on text: ``xattn-kv`` of a UNet, or ``context``.
        **kwargs: See ``ReferenceImages`` and ``ConceptEditor``; the reference images are what the tokens learn from.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    def __init__(
        self,
        rounds: int = 2,
        found_weight: float = 3.0,
        found_prompts: int = 8,
        guidance_edit: float = 0.25,
        retain: list[str] | None = None,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        edited_parameters: str = "xattn-kv",
        **kwargs: object,
    ) -> None:
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        for field, value, least in (("rounds", rounds, 0), ("found_prompts", found_prompts, 1)):
            if value < least:
                raise ValueError(f"model.{field}={value} must be at least {least}.")
        for field, number in (("found_weight", found_weight), ("guidance_edit", guidance_edit)):
            if not 0 <= number < float("inf"):
                raise ValueError(f"model.{field}={number} must be zero or a positive number.")
        if rounds and not found_weight:
            raise ValueError(f"model.found_weight=0 makes no use of {rounds} rounds: set model.rounds to 0.")
        self.rounds, self.found_weight, self.found_prompts = rounds, found_weight, found_prompts
        self.guidance_edit, self.seed, self.optimizer = guidance_edit, seed, optimizer
        self.pushed = [c for c in self.repaired if guidance_edit and c.kind in ATTRIBUTES]
        self.targets_of_edited = [(c, pairs_of(c)) for c in self.repaired]
        self.pairs = [pair for concept in self.repaired for pair in pairs_of(concept)]
        self.retain_prompts = self.prompts_to_retain(retain)

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights of the first linear maps on text that the pattern selects.

        Raises:
            ValueError: It selects another weight.
        """
        return select_first_maps(self, names)

    @property
    def fit_plan(self) -> FitPlan:
        """An epoch for each round; an item of a batch is one noised picture of every concept."""
        return FitPlan(
            epochs=self.rounds + 1, steps=None if self.rounds else 1, num_pairs=self.num_items, seed=self.seed
        )

    @property
    def num_items(self) -> int:
        """Largest number of prompts with a learned token that a concept can have."""
        return max(self.found_prompts, self.num_images)

    def values_shape(self) -> tuple[int, int, int]:
        """The learned tokens: (rounds, concepts, D), at least one round."""
        return max(self.rounds, 1), len(self.edited), sum(self.pipeline.token_widths)

    def own_state(self) -> list[str]:
        """The learned tokens."""
        return ["values"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer of the learned tokens; those of other rounds have no gradient."""
        return self.optimizer([self.values])

    # --- set-up

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Encode edit, target and retained prompts; draw the pictures that the tokens learn from."""
        super().on_fit_start()
        if self.pushed and not self.pipeline.leads_from_empty:
            rank_zero_info(
                f"guidance_edit={self.guidance_edit:g} has no effect on {self.pipeline.title}, whose guidance does not "
                "lead away from the empty prompt: the empty prompt is retained."
            )
            self.pushed = []
        self.ways = by_way(self.edited_names)
        self.keys, self.target_keys = self.edited_states(self.pairs)
        self.carrying = self.carrying_states()
        nothing, others = self.pipeline.tokenize([""]), self.pipeline.tokenize(self.retain_prompts)
        empty = self.flat(nothing, self.inputs(nothing, pipeline=self.pipeline.unskipped))  # as guidance reads it
        retained = self.flat(others, self.inputs(others))
        push = self.flat(nothing, self.push()) if self.pushed else {}
        found: dict[str, Retained] = {}
        for way, names in self.ways.items():
            kept = retained[way]
            moment, count, longest = second_moment(kept).cpu(), len(kept), largest_norm(kept)
            if self.pushed:
                # As many empty prompts as there are pairs, since each picture of a pair has one in its guidance.
                scale = len(self.pairs) ** 0.5
                goal = empty[way] + self.guidance_edit * push[way]
                self.keys[way] = torch.cat([self.keys[way], scale * empty[way]])
                self.target_keys[way] = torch.cat([self.target_keys[way], scale * goal])
            else:
                moment = moment + len(self.retain_prompts) * second_moment(empty[way]).cpu()
                count += len(self.retain_prompts) * len(empty[way])
                longest = max(longest, largest_norm(empty[way]))
            own = Retained(moment, count, prompts=len(self.retain_prompts), largest_norm=longest)
            found |= dict.fromkeys(names, own)
        self.retained = found
        if self.rounds:
            self.prompts = [self.token_prompts(concept) for concept in self.repaired]
            with self.pretrained.restored():
                named = [[text for text, _ in self.named_pairs(concept)] for concept in self.repaired]
                self.latents = self.reference_latents(named)

    def inputs(
        self, tokens: Tokens, embeddings: Tensor | None = None, pipeline: Pipeline | None = None
    ) -> dict[str, Tensor]:
        """What the edited maps of each way read of n prompts, (n, L, D) float32.

        Args:
            tokens: The prompts.
            embeddings: Embeddings of the learned token in them, (1, D), if they have one.
            pipeline: Reads them; None for the method's own.
        """
        pipeline = pipeline or self.pipeline
        condition = pipeline.encode_many(tokens) if embeddings is None else pipeline.encode(tokens, embeddings)
        return {way: found.float() for way, found in pipeline.first_inputs(condition).items() if way in self.ways}

    def edited_states(self, pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """K1 and K1* of each way, (m, D) float32: inputs at edit prompts, and at aligned places of targets."""
        tokens, targets = (self.pipeline.tokenize([pair[side] for pair in pairs]) for side in (0, 1))
        return self.flat(tokens, self.inputs(tokens)), self.flat(tokens, self.goals(tokens, targets))

    def flat(self, tokens: Tokens, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``inputs`` (n, L, D) of each way at the positions of ``tokens`` that are read, (m, D)."""
        return flattened(self.pipeline, tokens, inputs)

    def goals(self, tokens: Tokens, targets: Tokens) -> dict[str, Tensor]:
        """K1* of each way, (n, L, D) float32: inputs at ``targets``, at the positions of ``tokens`` aligned."""
        aligned = self.aligned(tokens, targets)
        goals = self.inputs(targets).items()
        return {way: found if way == "pooled" else taken(found, aligned) for way, found in goals}

    def aligned(self, tokens: Tokens, targets: Tokens) -> Tensor:
        """For each position of ``tokens``, the position of ``targets`` whose output it gets, (n, L)."""
        parts, start = [], 0
        for number in self.pipeline.token_order:
            text, ids, others = self.pipeline.texts[number], tokens.ids[number], targets.ids[number]
            rows = zip(ids.tolist(), others.tolist(), strict=True)
            parts.append(start + torch.tensor([align_tokens(*row, text.eos, text.begins) for row in rows]))
            start += ids.shape[1]
        return torch.cat(parts, dim=1)

    def carrying_states(self) -> dict[str, Tensor]:
        """Which inputs (m,) at edit prompts can have seen the concept: all, if an encoder reads both directions."""
        tokens, targets = (self.pipeline.tokenize([pair[side] for pair in self.pairs]) for side in (0, 1))
        masks = []
        for number in self.pipeline.token_order:
            ids, others = tokens.ids[number], targets.ids[number]
            causal = self.pipeline.texts[number].causal
            masks.append(from_first_difference(ids, others) if causal else torch.ones_like(ids, dtype=torch.bool))
        states, vectors = torch.cat(masks, dim=1), torch.ones(len(tokens), 1, dtype=torch.bool)
        return self.flat(tokens, {way: vectors if way == "pooled" else states for way in self.ways})

    def push(self) -> dict[str, Tensor]:
        """The directions of all pushed concepts on each way, (1, L, D): edit minus target inputs, a mean each.

        Of states it is the mean after the text, for each text encoder; the first token of a CLIP is the same in every
        prompt and has none.
        """
        total: dict[str, Tensor] = {}
        for concept in self.pushed:
            pairs = pairs_of(concept)
            tokens, targets = (self.pipeline.tokenize([pair[side] for pair in pairs]) for side in (0, 1))
            goals = self.goals(tokens, targets)
            for way, found in self.inputs(tokens).items():
                own = self._direction(way, found - goals[way], tokens)
                total[way] = total.get(way, torch.zeros(1)).to(found) + own.unsqueeze(0)
        return total

    def _direction(self, way: str, missing: Tensor, tokens: Tokens) -> Tensor:
        """The mean (L, D) of ``missing`` (n, L, D) after the texts ``tokens``, at all positions of each encoder."""
        if way == "pooled":
            return missing.mean(0)
        parts, start = [], 0
        for number in self.pipeline.token_order:
            text, ids = self.pipeline.texts[number], tokens.ids[number]
            after = (positions_mask(ids, text.eos, "eot", text.begins) & text.reads(ids)).flatten().to(missing.device)
            own = missing[:, start : start + ids.shape[1]].flatten(0, 1)[after].mean(0)
            parts.append(own.expand(ids.shape[1], -1).clone())
            if text.begins:
                parts[-1][0] = 0
            start += ids.shape[1]
        return torch.cat(parts)

    def named_pairs(self, concept: Concept) -> list[tuple[str, str]]:
        """Pairs of ``concept`` whose edit prompt names it, at most ``found_prompts``; from templates if none does."""
        named = [pair for pair in pairs_of(concept) if concept.find_name(pair[0])]
        if not named:
            templates = templates_of(concept, None)
            named = [(text.replace(PLACE, concept.names[0]), text.replace(PLACE, concept.target)) for text in templates]
        return named[: self.found_prompts]

    def token_prompts(self, concept: Concept) -> TokenPrompts:
        """The prompts in which a learned token stands for ``concept``."""
        pairs = self.named_pairs(concept)
        tokens = self.pipeline.tokenize_templates([concept.replace_names(text, PLACE) for text, _ in pairs], 1)
        targets = self.pipeline.tokenize([into for _, into in pairs])
        return TokenPrompts(tokens, targets)

    # --- the attack of a round

    @torch.no_grad()
    def on_train_epoch_start(self) -> None:
        """Begin the round's tokens as noise that is distributed like the vocabulary."""
        if self.current_epoch == 0:
            return
        for number in range(len(self.edited)):
            generator = seeded(self.seed, "token", self.current_epoch, number)
            self.values[self.current_epoch - 1, number] = self.pipeline.initial_embeddings(1, None, generator)[0]
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Error of the edited model's predictions on noised pictures of every concept, with its token in the prompt.

        Args:
            batch: Numbers of items, (B,); each takes one prompt and one picture of every concept.
            batch_idx: Number of the step within the round.
        """
        if self.current_epoch == 0:
            return (self.values * 0).sum()
        errors = []
        for number, prompts in enumerate(self.prompts):
            generators = [seeded(self.seed, self.current_epoch, batch_idx, number, item) for item in batch.tolist()]
            latents, noise, timesteps = self.noised(self.latents[number], generators)
            rows = (batch.cpu() % self.num_items) % len(prompts.tokens)
            condition = self.condition(prompts.tokens[rows], self.values[self.current_epoch - 1, number])
            output = self.pipeline.predict(self.pipeline.noise.add(latents, noise, timesteps), timesteps, condition)
            errors.append(F.mse_loss(output.float(), self.pipeline.noise.target(latents, noise, timesteps).float()))
        total = torch.stack(errors).sum()  # each token has only its own error's gradient
        self.log_losses({"train/error": total / len(errors)}, batch)
        return total

    @torch.no_grad()
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step of this round's tokens; others stay, also with an optimizer that moves without a gradient."""
        before = self.values.clone()
        with torch.enable_grad():
            super().optimizer_step(*args, **kwargs)
        others = torch.arange(len(self.values)) != self.current_epoch - 1
        self.values[others] = before[others]

    def condition(self, tokens: Tokens, embedding: Tensor) -> Condition:
        """Condition of prompts with one learned token, whose embedding is (D,); gradients flow into it."""
        return self.pipeline.encode(tokens, embedding[None])

    def noised(self, latents: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """For each generator one of ``latents`` (n, C, H, W) and noise, (B, C, H, W) each, and a timestep, (B,)."""
        chosen = [int(torch.randint(len(latents), (), generator=generator)) for generator in generators]
        timesteps = torch.stack([self.pipeline.noise.draw_timestep(generator) for generator in generators])
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        return latents[chosen], noise.to(latents), timesteps.to(latents.device)

    # --- the edit at the end of a round

    @torch.no_grad()
    def found_states(self, epoch: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys that the attacks up to ``epoch`` have found on each way, and the keys whose outputs they get, (m, D)."""
        keys, goals = ({way: [found[:0]] for way, found in self.keys.items()} for _ in range(2))
        for number, prompts in enumerate(self.prompts if epoch else ()):
            goal = self.flat(prompts.tokens, self.goals(prompts.tokens, prompts.targets))
            for embedding in self.values[:epoch, number]:
                for way, found in self.flat(prompts.tokens, self.inputs(prompts.tokens, embedding[None])).items():
                    keys[way].append(found)
                    goals[way].append(goal[way])
        scale = (self.found_weight / len(self.edited)) ** 0.5  # together they weigh as those of one concept do
        return {way: (scale * torch.cat(keys[way]), scale * torch.cat(goals[way])) for way in keys}

    def writes(self, epoch: int) -> Iterator[Sequence[Write]]:
        """All layers of a way at once, from their pretrained weights."""
        found = self.found_states(epoch)
        for way, names in self.ways.items():
            rows = [self.keys[way], found[way][0]], [self.target_keys[way], found[way][1]]
            keys, targets = (for_solving(torch.cat(both)) for both in rows)
            carrying = torch.zeros(len(keys), dtype=torch.bool)
            carrying[: len(self.carrying[way])] = self.carrying[way]
            group = []
            for name in names:
                layer = self.layers[name]
                weight = for_solving(self.pretrained.values[name].to(layer.weight.device))
                kept, values = self.retained[name], targets @ weight.mT
                group.append(Write(name, weight, layer.weight.dtype, keys, values, kept, concept_keys=carrying))
            yield group

    def _num_found(self) -> Iterator[int]:
        """Number of keys on each way that the attacks of a round find."""
        length = sum(self.pipeline.texts[number].length for number in self.pipeline.token_order)
        for way in self.keys:
            every = [
                (prompts.tokens, torch.ones(len(prompts.tokens), 1 if way == "pooled" else length))
                for prompts in (self.prompts if self.rounds else ())
            ]
            yield sum(len(self.flat(tokens, {way: ones})[way]) for tokens, ones in every)

    def after_writes(self, epoch: int, is_last: bool) -> None:
        """Report the number of keys, and how much the weights have changed."""
        counts = {
            way: len(keys) + epoch * found
            for (way, keys), found in zip(self.keys.items(), self._num_found(), strict=True)
        }
        (first, *others) = counts.values()
        self.report["edited_states"] = first if not others and "pooled" not in counts else counts
        super().after_writes(epoch, is_last)
