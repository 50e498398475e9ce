"""Compares costs with those of the authors' codes, side by side in one process.

    OMP_NUM_THREADS=1 python benchmarks/references.py --output docs/results/speed.md

The other codes are not here. Each row restates the *cost structure* of one of them in a few lines of our own: how often
it encodes, what it inverts, how it samples. A restatement names the repository and the commit that it restates, leaves
out what costs little there (saving, printing), and is not slower than that code where ``docs/parity.md`` has its time.
The sizes are those of Stable Diffusion 1.4, with random weights, which change no cost; the gradient codes, in
``reference_steps.py``, run on the embedded model.

Both sides of a row run one after the other, best of ``--repeats``. Encodes, positions and forwards are counted by hooks
and matrix factorisations by their calls; the tests assert these counts. Seconds depend on the machine, so they are only
printed; they are those of the processor, since other programs may run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from costs import Cost, Row, compared, table
from reference_steps import esd_row, step_rows
from torch import Tensor, nn

from lit_unlearn.core.closed_form import null_space_update, second_moment
from lit_unlearn.core.null_space import NullSpaceBasis
from lit_unlearn.core.null_space_solver import NullSpace
from lit_unlearn.core.reach import largest_norm
from lit_unlearn.core.refined_null_space import RefinedNullSpace
from lit_unlearn.core.retained_outputs import known_of
from lit_unlearn.core.solvers import Retained, RidgeMap, Write
from lit_unlearn.core.speed import k_means
from lit_unlearn.core.subject_tokens import last_subject_token
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.methods.shared.text_maps import retained_inputs, subject_places, text_keys

WORDS = (
    *("red", "old", "small", "wooden", "round", "wet", "glass", "paper", "blue", "iron", "soft", "tall", "dry"),
    *("bright", "heavy", "thin", "green", "stone", "warm", "silver"),
)
THINGS = (
    *("lamp", "horse", "bottle", "garden", "tiger", "chair", "bridge", "flower", "guitar", "clock", "boat", "apple"),
    *("mirror", "tower", "rabbit", "spoon"),
)
WIDTHS = [320] * 5 + [640] * 5 + [1280] * 6
"""Outputs of ``attn2.to_k`` in the 16 blocks of Stable Diffusion 1.4; those of ``to_v`` are the same."""


# --- texts and weights of the size of Stable Diffusion 1.4


def names(count: int, skip: int = 0) -> list[str]:
    """``count`` different names of two words."""
    return [" ".join(pair) for pair in product(WORDS, THINGS)][skip : skip + count]


def text_pipeline(hidden: int = 768, layers: int = 12, length: int = 77) -> Pipeline:
    """A pipeline with the text encoder of Stable Diffusion 1.4, random weights, and nothing else."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from lit_unlearn.diffusion.load import load_pipeline

    tokenizer = load_pipeline("emoji-sd").tokenizer
    tokenizer.model_max_length = length
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=length, hidden_act="quick_gelu", **special,
    )  # fmt: skip
    text_encoder = CLIPTextModel(config).eval().requires_grad_(False)
    return StableDiffusion(tokenizer, text_encoder, nn.Linear(1, 1), None, None)  # type: ignore[arg-type]


def random_weights(widths: Sequence[int], d_in: int = 768) -> list[Tensor]:
    """Weights (width, d_in), float32, of the spread that PyTorch gives them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(width, d_in, generator=generator) * d_in**-0.5 / 3**0.5 for width in widths]


def encode_one(pipeline: Pipeline, text: str) -> tuple[Tensor, int]:
    """States (L, d) of one prompt, the whole window, and the position of its last token."""
    ids = pipeline.tokenize([text]).ids[0]
    ends = (ids[0] == pipeline.texts[0].eos).int().argmax()
    return pipeline.texts[0].states(ids)[0], int(ends) - 1


# --- UCE


def uce_2025(pipeline: Pipeline, weights: Sequence[Tensor], edited: Sequence[str], kept: Sequence[str]) -> list[Tensor]:
    """rohitgandikota/unified-concept-editing at 28c81ed: each distinct text alone, one float32 inverse a matrix."""
    states = {}
    for text in [*edited, "", *kept]:
        if text not in states:
            whole, last = encode_one(pipeline, text)
            states[text] = whole[last : last + 1]
    outputs = {text: [states[text] @ weight.mT for weight in weights] for text in ["", *kept]}
    changed = []
    for number, weight in enumerate(weights):
        left, system = 0.5 * weight, 0.5 * torch.eye(weight.shape[1])
        for text, guide in [*((name, "") for name in edited), *((name, name) for name in kept)]:
            left = left + outputs[guide][number].mT @ states[text]
            system = system + states[text].mT @ states[text]
        changed.append(left @ torch.linalg.inv(system))
    return changed


def uce_2023(
    pipeline: Pipeline, weights: Sequence[Tensor], edited: Sequence[str], kept: Sequence[str], layers: int
) -> list[Tensor]:
    """The same at 35e91e2: for every matrix all texts, in pairs, again, and their outputs by every matrix."""
    changed, scale = [], max(0.1, 1 / (len(kept) + 1))
    for number, weight in enumerate(weights[:layers]):
        left, system = 0.5 * weight, 0.5 * torch.eye(weight.shape[1])
        for old, new, size in [*((name, " ", 1.0) for name in edited), *((name, name, scale) for name in ["", *kept])]:
            ids = pipeline.tokenize([old, new]).ids[0]
            context, goal = pipeline.texts[0].states(ids)
            if old != new:  # of an edited text only from its last token on, as far as both reach
                starts = last_subject_token(ids, pipeline.texts[0].eos)
                reach = ids.shape[1] - int(starts.max())
                context, goal = (
                    part[first : first + reach] for part, first in zip((context, goal), starts, strict=True)
                )
            values = [goal @ other.mT for other in weights]
            left = left + size * values[number].mT @ context
            system = system + size * context.mT @ context
        changed.append(left @ torch.linalg.inv(system))
    return changed


def our_uce(
    pipeline: Pipeline, weights: Sequence[Tensor], edited: Sequence[str], kept: Sequence[str], literal: str
) -> list[Tensor]:
    """What ``fit uce_2025.yaml`` or ``uce_2023.yaml`` does between loading and writing, its report included."""
    old = literal == "2023"
    which, guide = ("from_subject", " ") if old else ("last_subject", "")
    phrases, guides = text_keys(pipeline, edited, [guide] * len(edited), ways=["tokens"], which=which)
    rows, places, (goals,) = subject_places(pipeline, phrases["tokens"], [guides["tokens"]], which)
    keys, anchors = phrases["tokens"].at(rows, places).double(), guides["tokens"].at(rows, goals).double()
    retained = retained_inputs(pipeline, ["tokens"], kept, int(old), last_subject=not old)["tokens"]
    writes = [
        Write(str(number), weight.double(), torch.float32, keys, None, retained, anchors=anchors)
        for number, weight in enumerate(weights)
    ]
    solver = RidgeMap(1.0, None if old else 1.0, 0.5)
    return [write.weight + solved.change for write, solved in zip(writes, solver.solve(writes), strict=True)]


# --- SPEED


def speed(pipeline: Pipeline, weights: Sequence[Tensor], edited: Sequence[str], kept: Sequence[str]) -> list[Tensor]:
    """Ouxiang-Li/SPEED at 6d3df0c, its setting for many concepts: texts alone, float32 inverses and an SVD a matrix."""

    def last(texts: Sequence[str]) -> Tensor:
        return torch.stack([whole[place] for whole, place in (encode_one(pipeline, text) for text in texts)])

    keys, anchors, retained = last(edited), last([""] * len(edited)), last(kept)
    empty, _ = encode_one(pipeline, "")
    centres = k_means(empty[1:], 3, torch.Generator().manual_seed(0), starts=1).float()
    invariants = torch.cat([empty[:1], centres]).mT
    first, goal = keys.mT @ keys / len(keys), anchors.mT @ keys / len(keys)
    eye, changed = torch.eye(len(first)), []
    for weight in weights:
        erasing = weight @ (goal - first) @ torch.linalg.inv(eye + first)
        direction = torch.linalg.svd(weight, full_matrices=False)[2][-1:]
        copies = retained.repeat(10, 1) + torch.randn(10 * len(retained), 1) * direction
        shift = (copies @ erasing.mT).norm(dim=1)
        copies = torch.cat([retained, copies[shift > shift.mean()]])
        vectors, values, _ = torch.linalg.svd(copies.mT @ copies / len(copies))
        free = vectors[:, values < 1e-4]
        projector = free @ free.mT
        inverse = torch.linalg.inv(first @ projector + 0.05 * eye)
        fixed = torch.linalg.inv(invariants.mT @ projector @ inverse @ invariants + 1e-6 * torch.eye(4))
        within = eye - inverse @ invariants @ fixed @ invariants.mT @ projector
        changed.append(weight + weight @ (goal - first) @ projector @ within @ inverse)
    return changed


def our_speed(
    pipeline: Pipeline, weights: Sequence[Tensor], edited: Sequence[str], kept: Sequence[str]
) -> list[Tensor]:
    """What ``fit speed_paper.yaml`` with these settings does between loading and writing, its report included."""
    texts = edited, [""] * len(edited), kept
    found = [part["tokens"] for part in text_keys(pipeline, *texts, ways=["tokens"], which="last_subject")]
    keys, anchors, rows = (part.at(*subject_places(pipeline, part, [], "last_subject")[:2]).double() for part in found)
    empty = text_keys(pipeline, [""], ways=["tokens"])[0]["tokens"].states[0].double()
    invariants = torch.cat([empty[:1], k_means(empty[1:], 3, torch.Generator().manual_seed(0))])
    retained = Retained(second_moment(rows), len(rows), rows, invariants, len(rows), largest_norm(rows))
    writes = [
        Write(
            str(number),
            weight.double(),
            torch.float32,
            keys,
            None,
            retained,
            anchors,
            texts=len(edited),
            seed=(0, number),
        )
        for number, weight in enumerate(weights)
    ]
    solver = RefinedNullSpace(threshold=1e-4, retain_scale=0.05, filter=False)
    return [write.weight + solved.change for write, solved in zip(writes, solver.solve(writes), strict=True)]


# --- the closed form of one text layer


def layer(num_keys: int, d_in: int = 3072, d_out: int = 768) -> tuple[Tensor, Tensor, Tensor, NullSpaceBasis, Tensor]:
    """Weight, keys, values, a null space of about half of the inputs, and the moment of the retained keys."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(d_out, d_in, generator=generator) * d_in**-0.5
    spectrum = torch.logspace(2, -8, d_in, dtype=torch.float64).flip(0)
    vectors = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator).double())[0]
    keys, values = (torch.randn(num_keys, size, generator=generator) for size in (d_in, d_out))
    dimension = d_in // 2
    space = NullSpaceBasis(vectors[:, :dimension].contiguous(), spectrum, float(spectrum[dimension]))
    return weight, keys, values, space, (vectors * spectrum) @ vectors.mT


def alpha_edit(weight: Tensor, keys: Tensor, values: Tensor, projection: Tensor) -> Tensor:
    """jianghoucheng/AlphaEdit at f5248d3: one float32 solve of d_in x d_in for each layer."""
    residual = (values - keys @ weight.mT).mT
    system = projection @ (keys.mT @ keys) + 10 * torch.eye(weight.shape[1])
    return torch.linalg.solve(system, projection @ keys.mT @ residual.mT).mT


# --- the table


def uce_row(pipeline: Pipeline, weights: Sequence[Tensor], edited: int, kept: int, repeats: int) -> Row:
    """UCE's code of 2025 against ``uce_2025.yaml``."""
    texts = pipeline, weights, names(edited), names(kept, edited)
    theirs, ours = compared(lambda: uce_2025(*texts), lambda: our_uce(*texts, "2025"), repeats, pipeline.texts[0].model)
    return Row(f"UCE 2025, {edited} edited, {kept} preserved", "UCE 28c81ed", theirs, ours)


def uce_2023_row(pipeline: Pipeline, weights: Sequence[Tensor], edited: int, kept: int, layers: int) -> Row:
    """UCE's code of 2023, of which only some matrices are run, against ``uce_2023.yaml``."""
    texts = pipeline, weights, names(edited), names(kept, edited)
    theirs, ours = compared(
        lambda: uce_2023(*texts, layers), lambda: our_uce(*texts, "2023"), 1, pipeline.texts[0].model
    )
    share = len(weights) // layers
    scaled = Cost(theirs.seconds * share, theirs.encodes * share, theirs.positions * share, theirs.factorised * share)
    note = f"theirs: {layers} of {len(weights)} matrices, times {share}"
    return Row(f"UCE 2023, {edited} edited, {kept} preserved", "UCE 35e91e2", scaled, ours, note)


def speed_row(pipeline: Pipeline, weights: Sequence[Tensor], edited: int, kept: int, repeats: int) -> Row:
    """SPEED's code against our solver, with the setting for many concepts."""
    texts = pipeline, weights, names(edited), names(kept, edited)
    theirs, ours = compared(lambda: speed(*texts), lambda: our_speed(*texts), repeats, pipeline.texts[0].model)
    return Row(f"SPEED, {edited} edited, {kept} retained", "SPEED 6d3df0c", theirs, ours)


def layer_rows(num_keys: int, repeats: int, d_in: int = 3072) -> list[Row]:
    """AlphaEdit's solve against ours, without and with the report."""
    weight, keys, values, space, moment = layer(num_keys, d_in)
    projection, wide = space.projection.float(), weight.double()
    retained = Retained(moment, d_in, prompts=1)
    solver = NullSpace(ridge=10.0)
    solver.null_spaces = {retained: space}
    write = Write("weight", wide, torch.float32, keys, values, retained)

    known = known_of(wide, moment)  # with the null space, once for all rounds

    def theirs() -> object:
        return alpha_edit(weight, keys, values, projection)

    def solved() -> object:
        solver.outputs.remember({write.name: known})
        return solver.solve([write])

    alone = compared(theirs, lambda: null_space_update(wide, keys, values, space, 10.0), repeats)
    whole = compared(theirs, solved, repeats)
    case = f"closed form, {num_keys} keys of {d_in} inputs"
    report = whole[1].seconds - alone[1].seconds
    share = f"the report takes {report:.2f} s, {report / alone[1].seconds:.2f} of the solve; theirs reports nothing"
    return [
        Row(f"{case}: solve", "AlphaEdit f5248d3", *alone, "their float32 is off by 2e-4, our float64 by 1e-13"),
        Row(f"{case}: solve and report", "AlphaEdit f5248d3", *whole, share),
    ]


def main() -> None:
    """Run all rows, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=None, help="Markdown file to write, e.g. docs/results/speed.md")
    parser.add_argument("--only", nargs="+", default=["uce", "uce_2023", "speed", "layer", "esd", "steps"])
    arguments = parser.parse_args()
    repeats, rows = arguments.repeats, list[Row]()
    makers: dict[str, Callable[[Pipeline], list[Row]]] = {
        "uce": lambda pipeline: [
            uce_row(pipeline, random_weights(WIDTHS * 2), edited, kept, repeats)
            for edited, kept in ((1, 50), (100, 200))
        ],
        "uce_2023": lambda pipeline: [uce_2023_row(pipeline, random_weights(WIDTHS * 2), 1, 50, 1)],
        "speed": lambda pipeline: [speed_row(pipeline, random_weights(WIDTHS), 100, 200, repeats)],
        "layer": lambda pipeline: [row for num_keys in (180, 1155) for row in layer_rows(num_keys, repeats)],
        "esd": lambda pipeline: [esd_row(50, 50, repeats)],
        "steps": lambda pipeline: step_rows(11, repeats),
    }
    threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    command = shlex.join(["python", "benchmarks/references.py", *sys.argv[1:]])
    pipeline = text_pipeline()
    for name in arguments.only:
        for row in makers[name](pipeline):
            rows.append(row)
            print(f"{row.case}: {row.theirs} / {row.ours}: {row.ratio:.3f}", flush=True)
        if arguments.output:
            Path(arguments.output).write_text(table(rows, command, threads, repeats), encoding="utf-8")
    print(table(rows, command, threads, repeats))


if __name__ == "__main__":
    main()
