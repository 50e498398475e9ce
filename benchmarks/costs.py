"""What a run costs, counted and in seconds of the processor, side by side with another one."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from textwrap import fill
from unittest.mock import patch

import torch
from torch import Tensor, nn

COUNTS = ("encodes", "positions", "factorised", "forwards", "pictures")
FACTORISATIONS = ("inv", "solve", "cholesky_ex", "eigh", "eigvalsh", "svd", "svdvals")


@dataclass
class Cost:
    """What a run has cost.

    Attributes:
        seconds: CPU time of the process, the best of all repeats.
        encodes: Prompts that the text encoder has read.
        positions: Token positions that it has read.
        factorised: Inversions, factorisations and decompositions of matrices.
        forwards: Pictures that the denoiser has read.
        pictures: Pictures that the autoencoder has encoded.
    """

    seconds: float = float("inf")
    encodes: int = 0
    positions: int = 0
    factorised: int = 0
    forwards: int = 0
    pictures: int = 0


@dataclass(frozen=True)
class Row:
    """A line of the table: a case, the code that is restated, and both costs."""

    case: str
    restates: str
    theirs: Cost
    ours: Cost
    notes: str = ""

    @property
    def ratio(self) -> float:
        """Our seconds divided by theirs."""
        return self.ours.seconds / self.theirs.seconds


@contextmanager
def counted(
    text_encoder: nn.Module | None = None, denoiser: nn.Module | None = None, vae: nn.Module | None = None
) -> Iterator[Cost]:
    """Within the block, count what is encoded, factorised and denoised."""
    cost = Cost(0.0)

    def encoded(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        cost.encodes, cost.positions = cost.encodes + len(ids), cost.positions + ids.numel()

    def denoised(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        cost.forwards += len(args[0])

    def drawn(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        cost.pictures += len(args[0] if args else kwargs["sample"])

    def counting(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            cost.factorised += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        if text_encoder is not None:
            stack.callback(text_encoder.register_forward_pre_hook(encoded, with_kwargs=True).remove)
        if denoiser is not None:
            stack.callback(denoiser.register_forward_pre_hook(denoised).remove)
        if vae is not None:  # ``vae.encode`` is not a call of the whole module
            stack.callback(vae.encoder.register_forward_pre_hook(drawn, with_kwargs=True).remove)
        for name in FACTORISATIONS:
            stack.enter_context(patch.object(torch.linalg, name, counting(getattr(torch.linalg, name))))
        started = time.process_time()
        yield cost
        cost.seconds = time.process_time() - started


def compared(
    theirs: Callable[[], object],
    ours: Callable[[], object],
    repeats: int,
    text_encoder: nn.Module | None = None,
    denoiser: nn.Module | None = None,
) -> tuple[Cost, Cost]:
    """Costs of both, run in turn; the best seconds of each."""
    best = [Cost(), Cost()]
    for _ in range(repeats):
        for place, run in enumerate((theirs, ours)):
            with torch.no_grad() if denoiser is None else ExitStack(), counted(text_encoder, denoiser) as cost:
                run()
            if cost.seconds < best[place].seconds:
                best[place] = cost
    return best[0], best[1]


def table(rows: Sequence[Row], command: str, threads: str, repeats: int) -> str:
    """The table in Markdown."""
    made = (
        f"Made on {date.today()} by `{command}`, {threads} thread(s), {platform.machine()}, no GPU. The machine was "
        "shared, so these are seconds of the processor, and they wander still; both sides of a row ran in turn, "
        f"best of {repeats}."
    )
    meaning = (
        "*Theirs* is a restatement of the cost structure of the code at the commit named, not that code; see the head "
        "of the benchmark. Encodes are prompts, positions their tokens; *factorised* counts inversions, factorisations "
        "and decompositions; forwards are pictures that the denoiser reads, *pictures* those that the autoencoder "
        "encodes. Sizes are those of Stable Diffusion 1.4 with random weights; those of the gradient methods are the "
        "embedded model's."
    )
    lines = [
        "# Costs beside those of the authors' codes",
        "",
        fill(made, 120, break_long_words=False, break_on_hyphens=False),
        "",
        fill(meaning, 120),
        "",
        "| case | restates | seconds, theirs / ours | **ratio** | "
        "encodes | positions | factorised | forwards | pictures |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        a, b = row.theirs, row.ours
        pairs = [(a.encodes, b.encodes), (a.positions, b.positions), (a.factorised, b.factorised)]
        cells = [
            f"{x} / {y}" if x or y else "" for x, y in [*pairs, (a.forwards, b.forwards), (a.pictures, b.pictures)]
        ]
        seconds = f"{a.seconds:.2f} / {b.seconds:.2f}"
        lines.append(f"| {row.case} | {row.restates} | {seconds} | {row.ratio:.2f} | {' | '.join(cells)} |")
    notes = [fill(f"- {row.case}: {row.notes}.", 120, subsequent_indent="  ") for row in rows if row.notes]
    return "\n".join([*lines, "", *notes]) + "\n"
