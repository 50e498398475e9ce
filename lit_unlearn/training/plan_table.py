"""What a plan says, and how it is printed at 80 columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

DTYPES = ("float32", "bfloat16")
WIDTH = 80


@dataclass(frozen=True)
class Sites:
    """Edited weights of one kind and shape in a part.

    Attributes:
        part: The part.
        kind: The end of their names, such as ``attn2.to_k``.
        shape: Their shape.
        count: How many there are.
    """

    part: str
    kind: str
    shape: tuple[int, ...]
    count: int

    @property
    def parameters(self) -> int:
        """Number of weights in all of them."""
        return self.count * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Memory:
    """What a phase needs on the device, in bytes.

    Attributes:
        resident: If all parts are there all the time.
        offload: If each part is there only while it is used.
    """

    resident: int
    offload: int


@dataclass
class Plan:
    """What a fit would do.

    Attributes:
        model: The model as the user gave it.
        architecture: The published architecture that its sizes are taken from; None if they are its own.
        title: The family.
        method: Class of the method.
        dtype: Type of the weights in the recipe.
        sites: The edited weights.
        unread: Full names of weights that the pattern selects and with which no prompt is read.
        parameters: Number of parameters of each part.
        memory: For each type and phase what it needs.
        counts: Work in numbers, each with what it is.
        optimizer: Bytes of gradients and of the optimizer's state.
        ram: Bytes that the processor's memory must hold besides, with what they are.
        clip_skip: Layers that prompts are read earlier; None for none.
    """

    model: str
    architecture: str | None
    title: str
    method: str
    dtype: str
    sites: list[Sites]
    unread: list[str]
    parameters: dict[str, int]
    memory: dict[str, dict[str, Memory]] = field(default_factory=dict)
    counts: dict[str, str] = field(default_factory=dict)
    optimizer: int = 0
    ram: dict[str, int] = field(default_factory=dict)
    clip_skip: int | None = None

    def peak(self, dtype: str, offload: bool = False) -> int:
        """The most that any phase needs on the device, in bytes."""
        return max(found.offload if offload else found.resident for found in self.memory[dtype].values())

    def print(self, console: Console) -> None:
        """Print everything, in 80 columns."""
        sizes = f", sizes of {self.architecture}" if self.architecture not in (None, self.model) else ""
        console.print(f"{self.method} on {self.model} ({self.title}{sizes}); no weights were read.\n", markup=False)
        for table in (self._sites(), self._parts(), self._memory(), self._counts()):
            console.print(table)
        if self.unread:
            listed = ", ".join(self.unread[:3]) + (f" and {len(self.unread) - 3} more" if len(self.unread) > 3 else "")
            why = "nothing reads them"
            if self.clip_skip is not None:
                why = f"no prompt is read with them at clip_skip={self.clip_skip}"
            console.print(f"Left out, since {why}: {listed}", markup=False)

    def _sites(self) -> Table:
        table = _table(f"Edited: {sum(one.count for one in self.sites)} weights")
        for header, justify in {"part": "left", "weights": "left", "number": "right"}.items():
            table.add_column(header, justify=justify)  # type: ignore[arg-type]
        for header in ("shape", "millions"):
            table.add_column(header, justify="right")
        for one in self.sites:
            shape = " × ".join(map(str, one.shape))
            table.add_row(one.part, one.kind, str(one.count), shape, f"{one.parameters / 1e6:,.2f}")
        return table

    def _parts(self) -> Table:
        table = _table("Parameters")
        table.add_column("part")
        for header in ("millions", *(f"{dtype}, GB" for dtype in DTYPES)):
            table.add_column(header, justify="right")
        for name, count in [*self.parameters.items(), ("all", sum(self.parameters.values()))]:
            sizes = [_gigabytes(count * getattr(torch, dtype).itemsize) for dtype in DTYPES]
            table.add_row(name, f"{count / 1e6:,.1f}", *sizes)
        return table

    def _memory(self) -> Table:
        table = _table(f"Memory of the device, GB (the recipe: {self.dtype})")
        table.add_column("phase")
        for dtype in self.memory:
            table.add_column(dtype, justify="right")
            table.add_column("offload", justify="right")
        phases = next(iter(self.memory.values()))
        for phase in phases:
            both = [found[phase] for found in self.memory.values()]
            table.add_row(phase, *(_gigabytes(size) for one in both for size in (one.resident, one.offload)))
        peaks = [self.peak(dtype, offload) for dtype in self.memory for offload in (False, True)]
        table.add_row("most", *map(_gigabytes, peaks), style="bold")
        return table

    def _counts(self) -> Table:
        table = _table("Work")
        table.add_column("what")
        table.add_column("how much", justify="right")
        for what, amount in self.counts.items():
            table.add_row(what, amount)
        if self.optimizer:
            table.add_row("gradients and optimizer", f"{_gigabytes(self.optimizer)} GB")
        for what, size in self.ram.items():
            table.add_row(f"RAM: {what}", f"{_gigabytes(size)} GB")
        return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", header_style="bold", box=HORIZONTALS, width=WIDTH)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f}"
