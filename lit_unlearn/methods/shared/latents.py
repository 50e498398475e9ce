"""Latents that are made once and read by later runs: anchor pictures, reference pictures, encoded data sets.

Data flow: the settings (everything that determines the latents) give a key, and the key gives a folder. The folder
holds one file per chunk, each with the key and a hash of its content. Files that are missing, damaged or have another
key are made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_unlearn.diffusion.drawing import Drawing
from lit_unlearn.diffusion.parameters import fingerprint
from lit_unlearn.methods.shared.editor import DiffusionEditor
from lit_unlearn.system.files import atomic_write


def nothing() -> None:
    """The barrier of a single process."""


class CachedLatents(NamedTuple):
    """The result of a cache.

    Attributes:
        latents: All of them, (count, C, H, W), on the CPU.
        key: SHA-256 of everything that determines them.
        made: Number of latents made by this call, over all processes.
    """

    latents: Tensor
    key: str
    made: int


class LatentCache:
    """Latents on disk, in ``folder`` under a key of everything that determines them.

    They are made in chunks of fixed size, so that they are the same, bit for bit, with any number of processes and
    after an interruption. A file is written in one step; an interrupted run continues where it stopped.

    Args:
        folder: Folder of all caches; the files of this one are in ``folder/KEY``, where KEY is the first 16 digits of
            the key.
        settings: Everything that determines the latents, in types that JSON can store.
        count: Number of latents.
        chunk_size: Number of latents in a file; they are made together.

    Raises:
        ValueError: ``count`` or ``chunk_size`` is less than 1.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], count: int, chunk_size: int = 8) -> None:
        if count < 1 or chunk_size < 1:
            raise ValueError(f"count={count} and chunk_size={chunk_size} of a latent cache must be at least 1.")
        self.settings = {**settings, "count": count, "chunk_size": chunk_size}
        self.count, self.chunk_size = count, chunk_size
        self.num_chunks = -(-count // chunk_size)
        self.key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self.path = Path(folder).expanduser() / self.key[:16]

    def get(
        self,
        make: Callable[[list[int]], Tensor],
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] = nothing,
    ) -> CachedLatents:
        """Read the chunks that exist and make the others, each on one process; every process must call it.

        Args:
            make: Makes the latents (n, C, H, W) of one chunk from their numbers.
            rank: Number of this process.
            world_size: Number of processes.
            barrier: Waits for all processes.
        """
        chunks: dict[int, Tensor] = {}
        for number in range(self.num_chunks):
            try:
                chunk = self.read(number)
            except ValueError as error:
                rank_zero_info(f"{error}: it is made again.")
            else:
                if chunk is not None:
                    chunks[number] = chunk
        missing = [number for number in range(self.num_chunks) if number not in chunks]
        made = sum(len(self._numbers(number)) for number in missing)
        barrier()  # so that all processes see the same files before the first is written
        if missing:
            rank_zero_info(f"Making {made} of {self.count} latents in {self.path}; later runs read them.")
            if rank == 0:
                self._describe()
        for number in missing[rank::world_size]:
            chunks[number] = self._make(number, make)
        barrier()
        for number in missing:
            if number not in chunks:
                # Without a folder that all machines share, each machine makes all latents at least once.
                chunk = self.read(number)
                chunks[number] = self._make(number, make) if chunk is None else chunk
        return CachedLatents(torch.cat([chunks[number] for number in range(self.num_chunks)]), self.key, made)

    def read(self, number: int) -> Tensor | None:
        """The latents of chunk ``number`` on the CPU, (n, C, H, W); None if there is no such file.

        Raises:
            ValueError: The file is damaged, or belongs to other settings or another chunk.
        """
        file = self.file(number)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as tensors:
                metadata = tensors.metadata() or {}
                if (metadata.get("key"), metadata.get("chunk")) != (self.key, str(number)):
                    raise ValueError(f"{file} holds other latents than its folder says (another model or settings)")
                latents = tensors.get_tensor("latents")
        except FileNotFoundError:  # deleted in the meantime
            return None
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error})") from error
        if metadata.get("content") != fingerprint({"latents": latents}):
            raise ValueError(f"{file} is damaged (its content has another hash)")
        return latents

    def file(self, number: int) -> Path:
        """The file of chunk ``number``."""
        return self.path / f"{number:05}.safetensors"

    def _numbers(self, number: int) -> list[int]:
        return list(range(number * self.chunk_size, min((number + 1) * self.chunk_size, self.count)))

    def _make(self, number: int, make: Callable[[list[int]], Tensor]) -> Tensor:
        latents = make(self._numbers(number)).detach().cpu().contiguous()
        assert len(latents) == len(self._numbers(number))
        metadata = {"key": self.key, "chunk": str(number), "content": fingerprint({"latents": latents})}
        with atomic_write(self.file(number)) as file:
            file.write(save({"latents": latents}, metadata))
        return latents

    def _describe(self) -> None:
        """Describe the latents in a file for people who look into the folder; the program never reads it."""
        with atomic_write(self.path / "settings.json") as file:
            file.write(json.dumps(self.settings, indent=1, sort_keys=True).encode() + b"\n")


class PretrainedSampler:
    """Draws latents of prompts with the pretrained weights of a method's model, once, through a ``LatentCache``.

    It must be created and used while the trainer runs, on all processes.

    Args:
        module: The method; its edited weights may have changed already.
        num_inference_steps: Denoising steps.
        guidance_scale: Strength of classifier-free guidance; 1 means no guidance.
        folder: Folder of all caches.
        batch_size: Number of latents drawn at once.
    """

    def __init__(
        self,
        module: DiffusionEditor,
        num_inference_steps: int,
        guidance_scale: float,
        folder: str | Path,
        batch_size: int = 8,
    ) -> None:
        self.module = module
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.folder, self.batch_size = folder, batch_size
        with module.pretrained.restored():
            self.drawing = Drawing.of(module.pipeline, num_inference_steps, guidance_scale, decoded=False)

    def cache(self, prompts: Sequence[str], seeds: Sequence[int]) -> LatentCache:
        """The cache of the latents of ``prompts``, each from the noise of its own seed."""
        settings = {
            **asdict(self.drawing),
            "prompts": list(prompts),
            "seeds": list(seeds),
            # Token ids, since tokenizers may differ, also for the empty prompt.
            "input_ids": fingerprint({"input_ids": self.module.pipeline.tokenize([*prompts, ""]).ids[0]}),
        }
        return LatentCache(self.folder, settings, len(prompts), self.batch_size)

    @torch.no_grad()
    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> CachedLatents:
        """Latents (n, C, H, W) of ``prompts``, each from the noise of its own seed."""
        module, pipeline = self.module, self.module.pipeline

        def make(numbers: list[int]) -> Tensor:
            condition = pipeline.encode([prompts[number] for number in numbers])
            own = [seeds[number] for number in numbers]
            return pipeline.draw_latents(condition, own, self.num_inference_steps, self.guidance_scale)

        trainer = module.trainer
        with module.pretrained.restored():
            cache = self.cache(prompts, seeds)
            return cache.get(make, trainer.global_rank, trainer.world_size, trainer.strategy.barrier)
