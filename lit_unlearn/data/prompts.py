"""Prompts as batches: pairs of edit and target prompts for ``fit``, one item per picture for ``validate`` and ``test``.

The samplers are our own, so that results do not depend on the number of processes: every rank takes its share of each
global batch in the order that a single process would use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_unlearn.data.concepts import Concept, ConceptSet, load_concept_set
from lit_unlearn.data.edited import edited_concepts as edited_concepts
from lit_unlearn.data.fit_plan import fit_plan_of
from lit_unlearn.data.names import name_key
from lit_unlearn.system.names import check_numbers

MAX_PAIRS = 12
"""Maximum number of pairs of concepts that a warning lists."""


class PictureItem(NamedTuple):  # Lightning cannot walk through a frozen dataclass in its true precisions
    """One picture to generate and judge, with its own seed."""

    prompt: str
    question: str
    concept_index: int
    prompt_index: int
    image_index: int
    seed: int


def warn_of_edited_targets(targets: Sequence[tuple[Concept, Sequence[tuple[str, str]]]]) -> None:
    """Warn of edited concepts whose target names another edited concept.

    Args:
        targets: The edited concepts, each with pairs of a text and the text that it is edited into. A concept that both
            texts of a pair name belongs to the context, so it does not count as a target.
    """
    found = {}
    for concept, pairs in targets:
        for other in (other for other, _ in targets if other is not concept):
            if named := next((into for text, into in pairs if other.find_name(into) and not other.find_name(text)), ""):
                is_name = name_key(named) in map(name_key, other.names)
                found[concept.name, other.name] = "" if is_name else f" ({named!r})"
    if found:
        said = [f"{concept} \u2192 {other}{text}" for (concept, other), text in found.items()]
        more = f" and {len(said) - MAX_PAIRS} more" if len(said) > MAX_PAIRS else ""
        rank_zero_warn(
            f"Targets name concepts that are edited themselves: {', '.join(said[:MAX_PAIRS])}{more}; such concepts "
            "may change places instead of going away, which the score crosswise tells and forget does not: edit them "
            "in separate runs, or choose targets that are not edited."
        )


class Pictures(Dataset[PictureItem]):
    """Every (concept, prompt, image) of a concept set, in this order, then the adversarial prompts of some concepts.

    Args:
        concepts: The concept set.
        images_per_prompt: Pictures of each prompt.
        seed: Picture ``i`` of prompt ``p`` (counted over the set) has the seed ``seed + 100_000 * i + p``.
        prompts_per_kind: Take only this many direct and this many indirect prompts of each concept, the first ones.
        adversarial: Names of the concepts whose adversarial prompts are added at the end, with seeds that continue.
    """

    def __init__(
        self,
        concepts: ConceptSet,
        images_per_prompt: int,
        seed: int,
        prompts_per_kind: int | None = None,
        adversarial: Sequence[str] = (),
    ) -> None:
        self.items: list[PictureItem] = []
        number = 0
        for concept_index, concept in enumerate(concepts.concepts.values()):
            for kind, prompts in enumerate((concept.direct, concept.indirect)):
                for place, prompt in enumerate(prompts):
                    number += 1
                    if prompts_per_kind is not None and place >= prompts_per_kind:
                        continue
                    prompt_index = place + kind * len(concept.direct)
                    self.items += [
                        PictureItem(
                            prompt, concept.question, concept_index, prompt_index, i, seed + 100_000 * i + number - 1
                        )
                        for i in range(images_per_prompt)
                    ]
        for concept_index, concept in enumerate(concepts.concepts.values()):
            for place, prompt in enumerate(concept.adversarial):
                number += 1
                if concept.name in adversarial:
                    prompt_index = len(concept.prompts) + place
                    self.items += [
                        PictureItem(
                            prompt, concept.question, concept_index, prompt_index, i, seed + 100_000 * i + number - 1
                        )
                        for i in range(images_per_prompt)
                    ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> PictureItem:
        return self.items[index]


class RankSampler(Sampler[int]):
    """Items ``rank, rank + world_size, ...`` of ``order``; none is repeated, so later ranks may have one item less."""

    def __init__(self, order: list[int], rank: int, world_size: int) -> None:
        self.indices = order[rank::world_size]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class StepSampler(Sampler[list[int]]):
    """The batches of an epoch after the first ``done()``, so that a resumed run continues in the middle of an epoch."""

    def __init__(self, batches: list[list[int]], done: Callable[[], int]) -> None:
        self.batches, self.done = batches, done

    def __iter__(self) -> Iterator[list[int]]:
        # If all steps of the epoch were done when it was interrupted, the next epoch begins.
        return iter(self.batches[self.done() % len(self.batches) :])

    def __len__(self) -> int:
        return len(self.batches)


class ConceptPrompts(L.LightningDataModule):
    """Prompts of a concept set.

    ``fit`` yields batches of integers (B,), each ``slot * num_pairs + pair``: the index of a pair of edit and target
    prompt, and its position (slot) in the global batch, which distinguishes repetitions of a pair. ``validate`` and
    ``test`` yield lists of ``PictureItem``.

    Args:
        concept: Name or names of the concepts to edit; set with ``--concept``.
        concept_set: Name of a shipped concept set (``emoji20``) or path of a YAML file.
        batch_size: Prompt pairs in a training step, over all processes; null takes every pair once. If it exceeds the
            number of pairs, pairs are repeated.
        steps: Training steps per epoch (the null-space edit: steps of V1 per layer and round).
        images_per_prompt: Pictures of each evaluation prompt in ``test``.
        eval_batch_size: Pictures generated at once.
        seed: Seed of the evaluation pictures. The order of the prompt pairs comes from the method's seed.
    """

    def __init__(
        self,
        concept: str | list[str],
        concept_set: str = "emoji20",
        batch_size: int | None = None,
        steps: int = 12,
        images_per_prompt: int = 2,
        eval_batch_size: int = 40,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_numbers(
            "data",
            steps=steps,
            images_per_prompt=images_per_prompt,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
        )
        self.save_hyperparameters(logger=False)  # the logger merges them with the method's, which have a seed too
        self.concepts = load_concept_set(concept_set)
        self.edited = edited_concepts(concept, self.concepts)
        self.num_pairs = sum(len(item.edit_prompts) for item in self.edited)
        self.batch_size = batch_size
        self.steps, self.seed = steps, seed
        self.images_per_prompt, self.eval_batch_size = images_per_prompt, eval_batch_size

    def _share(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[int]:
        """Indices of prompt pairs: each step takes ``batch_size`` of them, in turn, in a shuffled order."""
        plan = fit_plan_of(self.trainer)
        generator = torch.Generator().manual_seed(plan.seed)
        rank, world_size = self._share()
        num_pairs, steps = plan.num_pairs or self.num_pairs, plan.steps or self.steps
        batch_size = self.batch_size or num_pairs
        if batch_size < world_size:
            raise ValueError(f"data.batch_size={batch_size} is less than the {world_size} processes: raise it.")
        order: list[int] = []
        while len(order) < steps * batch_size:
            order += torch.randperm(num_pairs, generator=generator).tolist()
        batches = [
            [slot * num_pairs + order[step * batch_size + slot] for slot in range(batch_size)] for step in range(steps)
        ]
        shares = [batch[rank::world_size] for batch in batches]
        sampler = StepSampler(shares, self._steps_done)
        return DataLoader(range(batch_size * num_pairs), batch_sampler=sampler)  # type: ignore[arg-type]

    def _steps_done(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed if self.trainer else 0  # type: ignore[attr-defined]

    def _pictures(self, dataset: Pictures) -> DataLoader[Any]:
        sampler = RankSampler(list(range(len(dataset))), *self._share())
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, collate_fn=list)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The first direct and the first indirect prompt of each concept, one picture each; nothing during a fit.

        During a fit ``EvaluationGrid`` draws pictures: validation would run before the edit at the end of the epoch.
        """
        if self.trainer and self.trainer.state.fn == TrainerFn.FITTING:
            return []
        return self._pictures(Pictures(self.concepts, 1, self.seed, prompts_per_kind=1))

    def test_dataloader(self) -> DataLoader[Any]:
        """Every evaluation prompt of every concept, and the adversarial prompts of the edited ones."""
        edited = [concept.name for concept in self.edited]
        return self._pictures(Pictures(self.concepts, self.images_per_prompt, self.seed, adversarial=edited))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch of tensors; picture items contain none."""
        return super().transfer_batch_to_device(batch, device, dataloader_idx) if isinstance(batch, Tensor) else batch

    def predict_dataloader(self) -> DataLoader[Any]:
        """As ``test_dataloader``."""
        return self.test_dataloader()
