"""What the command line offers beside the trainer: ``generate``, ``export``, ``verify``, ``demo`` and others."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lit_unlearn.diffusion.components import DiffusionComponents, check_model
from lit_unlearn.diffusion.sampling import draw_pictures
from lit_unlearn.diffusion.stored import WholeModel
from lit_unlearn.edits.checkpoint import Edit, load_edited, read_edit
from lit_unlearn.edits.export import check_output, export_delta, export_lora, export_pipeline, provenance
from lit_unlearn.edits.lora import FILE_NAME, parse_rank
from lit_unlearn.evaluation.grids import image_grid, save_png, to_pil
from lit_unlearn.system.devices import explaining_memory, find_device
from lit_unlearn.system.errors import plain_warnings, user_errors
from lit_unlearn.system.files import atomic_write
from lit_unlearn.training.recipes import find_recipe

MIN_SIDE = 256
"""Smaller pictures are enlarged to at least so many pixels."""


def generate(options: argparse.Namespace) -> None:
    """Draw pictures of prompts and write them as one PNG.

    Raises:
        UserError: An option, the checkpoint or the model is wrong.
    """
    output = Path(options.output)
    with user_errors():
        if output.suffix.lower() != ".png":
            raise ValueError(f"output={output} must end in .png.")
        if output.is_dir() or (output.exists() and not options.overwrite):
            raise ValueError(f"output={output} exists: choose another name, or pass --overwrite to replace it.")
        for field in ("num", "num_inference_steps", "scale", "batch_size"):
            value = getattr(options, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value} must be at least 1.")
        device = find_device(options.device)
        edit = read_edit(options.ckpt_path) if options.ckpt_path else None
        model = checked_model(options.model, edit)
    ways = [f"draw fewer at once (--batch_size, now {options.batch_size})"] if options.batch_size > 1 else []
    ways += ["draw on the processor (--device cpu)"] if device.type != "cpu" else []
    with user_errors(), explaining_memory("generate", device, ways):
        components = load_edited(model, edit, edit_revision(options.revision, edit), device)
    hyper_parameters = edit.hyper_parameters if edit else {}
    steps = options.num_inference_steps or hyper_parameters.get("num_inference_steps", 15)
    guidance_scale = options.guidance_scale
    if guidance_scale is None:
        guidance_scale = hyper_parameters.get("guidance_scale", 4.0)
    seeds = list(range(options.seed, options.seed + options.num))
    with plain_warnings(), explaining_memory("generate", device, ways):
        pictures = draw(components, options.prompts, seeds, steps, guidance_scale, options.batch_size)
    scale = options.scale or -(-MIN_SIDE // min(pictures.shape[-2:]))
    if len(pictures) == 1:
        image = to_pil(pictures[0])
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    else:
        rows = list(pictures.split(len(seeds)))
        image = image_grid(rows, options.prompts, [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else (), scale)
    save_png(output, image)
    what = f"edited ({', '.join(edit.concepts) or edit.method})" if edit else "not edited"
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    print(f"{output}: {model}, {what}, {steps} steps, guidance {guidance_scale:g}, {which}")


def draw(
    components: DiffusionComponents,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
) -> Tensor:
    """Pictures (prompts * seeds, 3, H, W) in [0, 1], each prompt with every seed, under a progress bar."""
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    pictures: list[Tensor] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Drawing", total=num_inference_steps * len(batches))
        handle = components.unet.register_forward_hook(lambda *_: progress.advance(task))
        try:
            for batch in batches:
                batch_prompts, batch_seeds = zip(*batch, strict=True)
                pictures.append(
                    draw_pictures(components, batch_prompts, batch_seeds, num_inference_steps, guidance_scale)
                )
        finally:
            handle.remove()
    return torch.cat(pictures)


def export(options: argparse.Namespace) -> None:
    """Write an edited pipeline as a diffusers folder, or its changed weights as safetensors.

    Raises:
        UserError: An option, the checkpoint or the model is wrong.
        OSError: The output cannot be written.
    """
    output = Path(options.output)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    old_names = options.names == "2022"
    with user_errors():
        rank = parse_rank(options.lora) if options.lora else None
        if options.delta and (options.lora or old_names):
            raise ValueError("--delta cannot be combined with --lora or --names: a delta has lit-unlearn's own names.")
        if (options.delta or options.lora) and output.suffix != ".safetensors":
            if output.is_symlink():
                check_output(output, options.overwrite)
            output = output / ("delta.safetensors" if options.delta else FILE_NAME)
        check_output(output, options.overwrite)
        edit = read_edit(options.ckpt_path)
        model = checked_model(options.model, edit)
        revision = edit_revision(options.revision, edit)
        if options.delta or options.lora:
            base = WholeModel.of(model, edit.dtype, revision)
            facts = provenance(edit, model, base, revision)
        if options.delta:
            export_delta(edit, facts, output, dtype)
        elif options.lora:
            report = export_lora(edit, facts, base, output, rank, dtype, old_names)
        else:
            export_pipeline(edit, model, output, dtype, revision, old_names)
    print(f"{output}: {model} without {', '.join(edit.concepts) or 'what it has unlearned'}")
    if options.lora:
        print(f"rank {report['rank']}; part of each layer's change that is missing:")
        for name, residual in report["residual"].items():
            print(f"  {name:60} {residual:.2e}")


def verify(options: argparse.Namespace) -> int:
    """Check an export against its provenance and print what differs.

    Returns:
        The exit code: 0 if all is as it should be, else 1.

    Raises:
        UserError: There is no export of lit-unlearn to check, or no such base model.
    """
    from lit_unlearn.edits.verify import findings_table, verify_export

    with user_errors():
        findings = verify_export(Path(options.export), options.base, options.revision)
    Console(soft_wrap=True).print(findings_table(findings))
    wrong = [finding for finding in findings if not finding.ok]
    print(
        f"{options.export}: "
        + (f"{len(wrong)} of {len(findings)} checks failed" if wrong else "as its provenance says")
    )
    return 1 if wrong else 0


def report(options: argparse.Namespace) -> None:
    """Write ``report.md``, ``report.csv`` and ``report.html`` of all tested runs below some folders.

    Raises:
        UserError: A folder holds no run, runs do not compare, or the output exists.
        OSError: The output cannot be written.
    """
    from lit_unlearn.reports.report import collect, report_csv, report_html, report_markdown

    output = Path(options.output)
    with user_errors():
        if options.grids < 0:
            raise ValueError(f"grids={options.grids} cannot be negative.")
        files = [output / f"report.{kind}" for kind in ("md", "csv", "html")]
        if (there := [path for path in files if path.exists()]) and not options.overwrite:
            raise ValueError(f"output={there[0]} exists: choose another folder, or pass --overwrite to replace it.")
        runs = collect(options.folders)
    contents = report_markdown(runs), report_csv(runs), report_html(runs, options.grids)
    for path, content in zip(files, contents, strict=True):
        with atomic_write(path) as file:
            file.write(content.encode())
        print(path)


def attack(options: argparse.Namespace) -> None:
    """Attack an edited model, write what came of it into the run's folder, and print it.

    Raises:
        UserError: An option, the checkpoint, the model or the judge is wrong, or there is nothing to attack with.
        OSError: The output cannot be written.
    """
    from lit_unlearn.attacks.run import attack_run
    from lit_unlearn.reports.attack_results import attacks_table

    with user_errors():
        device = find_device(options.device)
    ways = ["attack on the processor (--device cpu)"] if device.type != "cpu" else []
    with user_errors(), explaining_memory("attack", device, ways):
        results = attack_run(
            options.ckpt_path,
            options.attacks,
            concepts=options.concept,
            num_pictures=options.num_pictures,
            steps=options.steps,
            seed=options.seed,
            judge=options.judge,
            allow_names=options.allow_names,
            model=options.model,
            revision=options.revision,
            output=options.output,
            device=options.device,
            existing="replace" if options.overwrite else "refuse",
            say=print,
        )
    Console().print(attacks_table(results, f"{options.ckpt_path}: pictures that show the concept"))


def demo(options: argparse.Namespace) -> None:
    """Edit, test and export, as a person would by three commands, and say what came of it.

    Raises:
        UserError: The recipe or the concept is wrong.
        OSError: Something cannot be written.
    """
    from lit_unlearn.training import cli as training

    started = time.monotonic()
    recipe = ["--config", options.config, "--concept", options.concept]
    found = ["--config", str(find_recipe(options.config)), "--concept", options.concept]
    _say("fit", *recipe)
    fit = training.run(["fit", *found])
    folder = Path(fit.trainer.log_dir or "")
    ckpt_path = str(folder / "checkpoints" / "last.ckpt")
    _say("test", *recipe, "--ckpt_path", ckpt_path)
    training.run(["test", *found, "--ckpt_path", ckpt_path])
    output = str(folder / "pipeline")
    _say("export", "--ckpt_path", ckpt_path, "--output", output)
    no_options = dict.fromkeys(("delta", "lora", "names", "dtype", "model", "revision", "overwrite"))
    export(argparse.Namespace(ckpt_path=ckpt_path, output=output, **no_options))

    where: dict[str, Path] = {
        "pictures before and after": folder / "grid.png",
        "scores": folder / "scores.json",
        "edited pipeline, for diffusers": Path(output),
        "everything else of the run": folder,
    }
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    for what, path in where.items():
        if path.exists():
            print(f"  {what + ':':32}{path}")
    print(f"  {'curves and pictures:':32}tensorboard --logdir {folder.parents[len(Path(fit.run_name).parts)]}")
    prompt = fit.edited[0].direct[0]
    print("\nTry next:")
    print(f"  {_command('generate', prompt, '--ckpt_path', ckpt_path, '--output', 'edited.png')}")
    print(f"  {_command('generate', prompt, '--output', 'unedited.png')}")
    other = next(name for name in fit.concept_names if name not in {concept.name for concept in fit.edited})
    print(f"  {_command('demo', '--concept', other)}")


def _command(*args: str) -> str:
    return shlex.join(["lit-unlearn", *args])


def _say(*args: str) -> None:
    print(f"\n$ {_command(*args)}", flush=True)


def checked_model(model: str | None, edit: Edit | None) -> str:
    """The model to load, checked: the given one, else the one that was edited, else the embedded one."""
    if edit is None:
        model = model or "emoji-sd"
        check_model(model)
        return model
    model = model or edit.model
    edit.check_base(model)
    return model


def edit_revision(revision: str | None, edit: Edit | None) -> str | None:
    """The revision of a hub id to load: the given one, else that of the edit."""
    return revision or (edit.hyper_parameters.get("revision") if edit else None)
