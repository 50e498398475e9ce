"""Erased Stable Diffusion (Gandikota et al., 2023): trains the model to predict as if guided away from a concept.

Data flow: a sampling chain of the concept's prompt with classifier-free guidance passes through states x_t. At such a
state the target is computed from the frozen model's predictions for the prompt and for the empty prompt, and the edited
weights are trained to predict it for the prompt. In the frozen model's chains, guidance has already computed these two
predictions, so whole chains are kept, shuffled and used up before new ones are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_unlearn.core.objectives import esd_target
from lit_unlearn.diffusion.condition import Condition
from lit_unlearn.diffusion.sampling import seeded
from lit_unlearn.diffusion.trajectories import ReuseSchedule, sample_chains, sample_state
from lit_unlearn.methods.shared.concept_editor import ConceptEditor
from lit_unlearn.methods.shared.gradient import GradientEditor
from lit_unlearn.system.names import check_numbers


class States(NamedTuple):
    """The data of one step.

    Attributes:
        model_input: x_t, scaled as the UNet's input, (B, C, H, W).
        timesteps: t, (B,).
        prompts: Number of the prompt that each x_t was drawn for, (B,).
        noise_preds: The frozen model's predictions for the empty prompt, the prompt and, if given, ``erase_from``,
            (B, C, H, W) each.
    """

    model_input: Tensor
    timesteps: Tensor
    prompts: Tensor
    noise_preds: tuple[Tensor, ...]


class ESD(GradientEditor, ConceptEditor):
    """Erases a concept by negative guidance of the frozen model.

    One run can erase several concepts: each state belongs to a prompt of one of them. If states are kept, the shuffle
    chooses the prompt; otherwise the data does, and all concepts have the same share.

    Args:
        eta: Strength of the negative guidance; see ``eta_form``.
        eta_form: ``paper``: the target is ``e_0 - eta (e_c - e_0)``. ``code``: it is ``e_from - eta (e_c - e_0)``, as
            in the authors' code of 2025, which without ``erase_from`` equals ``paper`` with ``eta - 1``.
        start_guidance: Guidance scale of the chains.
        num_chain_steps: Sampler steps of a whole chain.
        chain_sampler: Sampler of the chains: the ``model``'s own, or ``ddim``.
        states_from: Model whose chains give x_t: ``frozen`` (the authors' code of 2025) or ``edited`` (their code of
            2023), which needs ``states_per_chain=one``.
        states_per_chain: ``all``: many chains are made at once, every state is used, and the target is computed from
            the chain's own predictions. ``one``: every state has its own chain, sampled to a random stop, as in the
            authors' codes.
        chains: Chains made at once (``all`` only); 2 times as many inputs pass through the UNet, or 3 times with
            ``erase_from``.
        passes: How often each state is used before new chains are made (``all`` only).
        erase_from: Prompt to erase the concept from (``c_from``); null takes the concept's own prompt. Needs
            ``eta_form=code``.
        prompts: Which prompts a concept has: its bare ``names``, or its ``edit_prompts``.
        edited_parameters: Group or pattern of UNet weights.
        **kwargs: See ``GradientEditor``, ``ConceptEditor`` and ``DiffusionEditor``.

    Raises:
        ValueError: A field is wrong; found before any weight is loaded.
    """

    num_pairs: int

    def __init__(
        self,
        eta: float = 1.0,
        eta_form: Literal["paper", "code"] = "paper",
        start_guidance: float = 3.0,
        num_chain_steps: int = 50,
        chain_sampler: Literal["model", "ddim"] = "model",
        states_from: Literal["frozen", "edited"] = "frozen",
        states_per_chain: Literal["all", "one"] = "all",
        chains: int = 4,
        passes: int = 1,
        erase_from: str | None = None,
        prompts: Literal["names", "edit_prompts"] = "names",
        edited_parameters: str = "xattn",
        **kwargs: object,
    ) -> None:
        super().__init__(edited_parameters=edited_parameters, **kwargs)  # type: ignore[arg-type]
        if not eta > 0:
            raise ValueError(
                f"model.eta={eta} does not guide away from the concept: give a positive number (1 in the paper's form, "
                "2 in the code's)."
            )
        if not start_guidance >= 0:
            raise ValueError(f"model.start_guidance={start_guidance} must not be negative: the paper uses 3.")
        check_numbers("model", num_chain_steps=num_chain_steps, chains=chains, passes=passes)
        self.base.check_steps(num_chain_steps, "model.num_chain_steps", chain_sampler)
        if states_from == "edited" and states_per_chain == "all":
            raise ValueError(
                "model.states_from='edited' samples each state with the current weights, so states cannot be kept: "
                "set model.states_per_chain=one."
            )
        if erase_from is not None and eta_form == "paper":
            raise ValueError(
                f"model.erase_from={erase_from!r} has no effect in the paper's form of the target: "
                "set model.eta_form=code."
            )
        self.eta, self.eta_form, self.erase_from = eta, eta_form, erase_from
        self.start_guidance, self.num_chain_steps, self.chain_sampler = start_guidance, num_chain_steps, chain_sampler
        self.states_from, self.states_per_chain = states_from, states_per_chain
        self.chains, self.passes = chains, passes
        self.targets_of_edited = [(c, [("", erase_from)] if erase_from else []) for c in self.repaired]
        of_concepts = [c.names if prompts == "names" else c.edit_prompts for c in self.repaired]
        # Concepts take turns, so that any few consecutive prompts contain each concept equally often.
        self.prompts = [own[i % len(own)] for i in range(max(map(len, of_concepts))) for own in of_concepts]
        self.num_pairs = len(self.prompts)

    def select(self, names: Sequence[str]) -> list[str]:
        """Weights of the denoiser that the pattern selects.

        Raises:
            ValueError: It selects another weight.
        """
        part = self.base.family.denoiser_part
        why = f": ESD edits only weights of the {part}; choose a group of it or a pattern within {part}."
        return self.select_only(names, lambda name: name.startswith(f"{part}."), why)

    def on_fit_start(self) -> None:
        """Encode the prompts, and drop states that an earlier run may have kept."""
        super().on_fit_start()
        prompts = ["", *self.prompts, *([] if self.erase_from is None else [self.erase_from])]
        with torch.no_grad():
            encoded = self.pipeline.encode_many(prompts)
        self.unconditional, self.of_prompts, self.of_erase_from = encoded.split(
            [1, self.num_pairs, len(encoded) - 1 - self.num_pairs]
        )
        if self.pipeline.clip_skip is not None:  # which is not for what guidance leads away from
            self.unconditional = self.pipeline.unskipped.encode_many([""]).detach()
        self.sampler = self.pipeline.with_sampler(self.chain_sampler)
        self.timesteps = self.sampler.noise.timesteps(self.num_chain_steps).to(self.device)
        self.schedule = ReuseSchedule(self.chains, len(self.timesteps), self.passes, self.seed)
        self.refresh, self.kept = -1, torch.empty(0)
        self.global_batch_size = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Error of the edited weights' prediction against the frozen model's negative guidance.

        Args:
            batch: Numbers of prompts, as in ``ConceptPrompts``, (B,); if states are kept, places in the global batch.
            batch_idx: Number of the step within the epoch.
        """
        take = self.kept_states if self.states_per_chain == "all" else self.sampled_states
        states = take(batch, batch_idx)
        uncond, concept, *erase_from = (pred.float() for pred in states.noise_preds)
        base = uncond if self.eta_form == "paper" else (*erase_from, concept)[0]
        target = esd_target(base, concept, uncond, self.eta)
        condition = self.conditions(states.prompts)[-1]  # that of erase_from, if given, else that of the prompts
        noise_pred = self.pipeline.predict(states.model_input, states.timesteps, condition)
        loss = F.mse_loss(noise_pred.float(), target)
        self.log_losses({"train/loss": loss}, batch)
        return loss

    def conditions(self, prompts: Tensor) -> list[Condition]:
        """Conditions of the empty prompt, of the prompts numbered ``prompts`` (B,) and, if given, of ``erase_from``."""
        own = [self.unconditional, self.of_prompts[prompts], *([self.of_erase_from] if len(self.of_erase_from) else [])]
        return [condition.expand(len(prompts)) for condition in own]

    # --- states_per_chain: all

    def kept_states(self, batch: Tensor, batch_idx: int) -> States:
        """The next states of the frozen model's chains: place j of global step n gets the state of use n * size + j."""
        if not self.global_batch_size:
            size = self.trainer.strategy.reduce(torch.tensor(len(batch), device=self.device), reduce_op="sum")
            self.global_batch_size = int(size)
        step = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        first = step * self.global_batch_size
        places = [self.schedule.place(first + item // self.num_pairs) for item in batch.tolist()]
        rows: dict[int, Tensor] = {}
        # Every process makes its share of all chains that the global batch needs, not only those of its own items.
        for refresh in self.schedule.refreshes(first, self.global_batch_size):
            self.make_chains(refresh)
            rows |= {i: self.kept[p.chain, p.state] for i, p in enumerate(places) if p.refresh == refresh}
        model_input, *noise_preds = torch.stack([rows[i] for i in range(len(places))], dim=1)
        numbers = torch.tensor([place.state for place in places], device=self.device)
        prompts = torch.tensor([self.prompt_of(place.refresh, place.chain) for place in places], device=self.device)
        return States(model_input, self.timesteps[numbers], prompts, tuple(noise_preds))

    def prompt_of(self, refresh: int, chain: int) -> int:
        """Number of the prompt of a chain: prompts take turns, also across refreshes."""
        return (refresh * self.chains + chain) % self.num_pairs

    def make_chains(self, refresh: int) -> None:
        """Make and keep the chains of ``refresh`` if they are missing; they depend only on seed and ``refresh``."""
        if refresh == self.refresh:
            return

        def make(numbers: list[int]) -> Tensor:
            prompts = torch.tensor([self.prompt_of(refresh, number) for number in numbers], device=self.device)
            seeds = [seeded("chain", self.seed, refresh, number).initial_seed() for number in numbers]
            noise, generators = self.sampler.start_chains(seeds)
            conditions = self.conditions(prompts)
            return sample_chains(self.sampler, conditions, noise, self.num_chain_steps, self.start_guidance, generators)

        with self.pretrained.restored():
            self.kept = self.processes.made_once(self.chains, make)
        self.refresh = refresh

    # --- states_per_chain: one

    def sampled_states(self, batch: Tensor, batch_idx: int) -> States:
        """For each item a state at a random stop of its own chain, and the frozen model's predictions there."""
        prompts = batch % self.num_pairs
        found = []
        with self.pretrained.restored() if self.states_from == "frozen" else nullcontext():
            for generator, prompt in zip(self.generators(batch, batch_idx), prompts, strict=True):
                stop = int(torch.randint(len(self.timesteps), (), generator=generator))
                seed = int(torch.randint(2**31, (), generator=generator))
                guided = self.conditions(prompt[None])[:2]
                noise, generators = self.sampler.start_chains([seed])
                chain = (noise, self.num_chain_steps, self.start_guidance)
                found.append(sample_state(self.sampler, guided, *chain, stop, generators))
        torch.clear_autocast_cache()  # of weights that were cast without a gradient
        model_input = torch.cat([state for state, _ in found])
        timesteps = torch.stack([timestep for _, timestep in found])
        conditions = self.conditions(prompts)
        count = len(conditions)
        noise_preds = self.pretrained_prediction(
            model_input.repeat(count, 1, 1, 1), timesteps.repeat(count), Condition.cat(conditions)
        )
        return States(model_input, timesteps, prompts, noise_preds.chunk(count))

    def on_train_epoch_end(self) -> None:
        """Report the cost of a step, in forwards of one picture (a backward counts as two)."""
        super().on_train_epoch_end()
        cost = self.current_cost()
        equivalents = cost["unet_forwards"] + 2 * cost["unet_backwards"]
        self.report["unet_forward_equivalents_per_step"] = equivalents / max(1, self.trainer.global_step)
