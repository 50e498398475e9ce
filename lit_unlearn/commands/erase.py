"""``lit-unlearn erase "Mickey Mouse" --to "a cartoon mouse"``: from a name to an edited model, scored and exported.

Data flow, each step refusing what the next could not use, and no model is loaded before the third:

1. ``data.templates`` (for the embedded models ``emoji.concepts``) makes a concept set of the name; the judge is chosen
   and asked what it can answer; the recipe is found; ``Plan`` has all of it and says what will be drawn and written.
   ``--dry_run`` ends here.
2. ``Plan.write``: ``logs/METHOD/NAME@erase-KEY/`` gets ``concepts.yaml`` and ``recipe.yaml``, a recipe as any other.
   KEY is a hash of the set, so a folder has one set.
3. ``check_drawn``: the unedited model draws the concept's evaluation prompts and the judge looks: a concept that is not
   drawn cannot be erased.
4. ``fit``, ``test`` and ``export`` with that recipe, as a user would call them; without a judge, pictures before and
   after instead of a test.
5. ``evaluation.verdict``: whether it worked, what was written, and the command that repeats it.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.commands.parser import Once, Parser, command_parser
from lit_unlearn.data.kinds import KINDS
from lit_unlearn.data.names import bare, name_key
from lit_unlearn.system.errors import UserError, plain_warnings, user_errors, warn
from lit_unlearn.training.recipes import find_recipe

if TYPE_CHECKING:
    from lit_unlearn.data.concepts import Concept, ConceptSet
    from lit_unlearn.diffusion.base_model import BaseModel
    from lit_unlearn.judges.base import Judge

DESCRIPTION = "erase a concept that you name: write its prompts, edit, score and export"
DRAWN = 0.2
"""Least share of the unedited model's pictures that must show the concept."""
STEPS = 30
GUIDANCE = {"FluxPipeline": 3.5, "StableDiffusion3Pipeline": 7.0, "StableDiffusionXLPipeline": 5.0}
"""Denoising steps and guidance for models that are not the embedded ones; 7.5 for other families."""


def parser() -> Parser:
    """Options of ``erase``."""
    made = command_parser("erase", DESCRIPTION)
    made.add_argument("concept", metavar="NAME", help="what to erase, as people write it; an object needs no article")
    made.add_argument("--to", action=Once, help="what to draw in its place")
    made.add_argument("--kind", default="object", help=f"{', '.join(KINDS)}; default: object")
    made.add_argument("--also", action="append", default=[], metavar="NAMES", help="further words for it, by commas")
    made.add_argument(
        "--protect", action="append", default=[], metavar="NAMES", help="neighbours that must stay, by commas"
    )
    made.add_argument("--retain", metavar="FILE", help="prompts that must stay: .csv with a column prompt, or .txt")
    made.add_argument("--prompts", metavar="FILE", help="prompts of the concept to judge too: .csv or .txt")
    made.add_argument("--method", help="recipe; default: null_space, and null_space_context if a model is named")
    made.add_argument("--model", help="diffusers folder or hub id; default: emoji-sd, which is embedded")
    made.add_argument("--revision", help="branch, tag or commit, if the model is a hub id")
    made.add_argument("--judge", help="judge, or none; default: emoji for the embedded models, else clip")
    made.add_argument("--question", help="question to the judge; yes means that the picture shows the concept")
    made.add_argument("--images_per_prompt", type=int, help="pictures of each prompt; default: 2 of emoji-sd, else 1")
    made.add_argument("--num_inference_steps", type=int, help=f"denoising steps; default: {STEPS}, for emoji-sd 8")
    made.add_argument("--guidance_scale", type=float, help="classifier-free guidance; default: the family's usual")
    made.add_argument("--output", "-o", metavar="DIR", help="folder for the edited model; default: in the run")
    made.add_argument("--delta", action="store_true", help="write only the changed weights")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier export in --output")
    made.add_argument("--anyway", action="store_true", help="edit even if the model does not draw the concept")
    made.add_argument("--dry_run", action="store_true", help="say what would be done, and stop")
    return made


@dataclass(frozen=True)
class Plan:
    """All that an erasure needs, checked.

    Attributes:
        concepts: The concept set, whose path is the file that ``write`` makes.
        concept: The concept to erase.
        base: The model.
        recipe: Content of the recipe.
        judge: Name of the judge; None if nothing will be judged.
        why: Why that judge, or none.
        embedded: Whether the model is one that ships with the project.
        options: The options of the command.
    """

    concepts: ConceptSet
    concept: Concept
    base: BaseModel
    recipe: dict[str, Any]
    judge: str | None
    why: str
    embedded: bool
    options: argparse.Namespace

    @property
    def steps(self) -> int:
        """Denoising steps of a picture."""
        return int(self.recipe["model"]["init_args"]["num_inference_steps"])

    @property
    def guidance_scale(self) -> float:
        """Strength of classifier-free guidance."""
        return float(self.recipe["model"]["init_args"]["guidance_scale"])

    @property
    def folder(self) -> Path:
        """Folder of the set, the recipe and the runs."""
        return self.concepts.path.parent

    def lines(self) -> list[str]:
        """What will be done, in a few lines."""
        counts, others = self.concepts.counts, len(self.concepts.concepts) - 1
        each = self.recipe["data"]["init_args"].get("images_per_prompt", 2)
        check = len(self.concept.prompts)
        test = (counts.direct + counts.indirect) * (others + 1) * each + len(self.concept.adversarial) * each
        drawn = f"{check} pictures for a look at the unedited model, then 2 x {test if self.judge else check}"
        size = sum(file.stat().st_size for file in self.base.folder.rglob("*")) if self.base.folder else 0
        space = "the changed weights" if self.options.delta else f"the edited model ({size / 1e6:,.0f} MB)"
        judged = "" if self.judge is None else ", which are judged too"
        return [
            f"erase     {self.concept.name} ({self.concept.kind}), to draw {self.concept.target} instead",
            f"model     {self.base.name}",
            f"method    {self.recipe['method']}",
            f"judge     {self.why}",
            f"prompts   {len(self.concept.edit_prompts)} to edit, {len(self.concept.prompts)} to judge",
            f"retain    {len(self.concepts.retain_prompts([self.concept.name]))} prompts; {others} concepts{judged}",
            f"draw      {drawn}, {self.steps} steps each",
            f"write     {self.folder}: concepts.yaml, recipe.yaml, the run; {space}",
        ]

    def write(self) -> Path:
        """Write ``concepts.yaml`` and the recipe; the path of the recipe.

        Raises:
            OSError: They cannot be written.
        """
        import yaml

        from lit_unlearn.system.files import atomic_write, naming

        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        head = f"# Made by: lit-unlearn erase {shlex.quote(self.concept.name)}"
        texts = (self.concepts.content(), self.recipe)
        dumped = [yaml.safe_dump(text, sort_keys=False, allow_unicode=True, width=120) for text in texts]
        place, number = self.folder / "recipe.yaml", 1
        while place.exists() and place.read_text(encoding="utf-8") != f"{head}\n{dumped[1]}":  # of another model
            number += 1
            place = self.folder / f"recipe_{number}.yaml"
        for path, text in zip((self.concepts.path, place), dumped, strict=True):
            with atomic_write(path) as file:
                file.write(f"{head}\n{text}".encode())
        return place


def run(options: argparse.Namespace) -> int:
    """Erase a concept; see the module.

    Returns:
        0 if the concept is erased and the others are kept, or nothing was judged; 1 if the edit failed.

    Raises:
        UserError: An option is wrong, or the model does not draw the concept.
        OSError: Something cannot be written.
    """
    with user_errors(), plain_warnings():
        _check(options)
        plan = plan_of(options)
    print("\n".join(plan.lines()))
    if options.dry_run:
        return 0
    from lit_unlearn.training import cli as training

    plan = check_drawn(plan)
    recipe = plan.write()
    _say("fit", "--config", str(recipe))
    fit = training.run(["fit", "--config", str(recipe)])
    folder = Path(fit.trainer.log_dir or "")
    ckpt_path = str(folder / "checkpoints" / "last.ckpt")
    if plan.judge is not None:
        _say("test", "--config", str(recipe), "--ckpt_path", ckpt_path)
        training.run(["test", "--config", str(recipe), "--ckpt_path", ckpt_path])
    else:
        draw_pairs(plan, ckpt_path, folder / "grid.png")
    output = _export(options, ckpt_path, folder)
    return _conclude(plan, folder, recipe, output)


def plan_of(options: argparse.Namespace) -> Plan:
    """Check the options, make the concept set and choose judge and recipe, without loading a model.

    Raises:
        ValueError: An option is wrong; the message names it.
        UserError: There is no such recipe.
    """
    import yaml

    from lit_unlearn.data.concepts import concept_set_of
    from lit_unlearn.data.tables import read_prompts
    from lit_unlearn.data.templates import Wish, set_of, split_names
    from lit_unlearn.diffusion.base_model import BaseModel
    from lit_unlearn.diffusion.source import EMBEDDED, SHIPPED, shipped_folder
    from lit_unlearn.emoji.concepts import emoji_set
    from lit_unlearn.judges.load import check_judge_name, find_judge
    from lit_unlearn.training.runs import run_name

    protect, also = split_names(options.protect), tuple(split_names(options.also, "also"))
    retain = [row.prompt for row in read_prompts(options.retain, "retain")] if options.retain else []
    prompts = tuple(row.prompt for row in read_prompts(options.prompts)) if options.prompts else ()
    model = options.model or EMBEDDED
    base = BaseModel.find(model, options.revision)
    shipped = [folder.resolve() for name in SHIPPED if (folder := shipped_folder(name))]
    embedded = isinstance(base.place, Path) and base.place.resolve() in shipped
    method = options.method or ("null_space_context" if options.model else "null_space")
    recipe = yaml.safe_load(find_recipe(method).read_text(encoding="utf-8"))
    _check_recipe(method, recipe)
    judge, why = _judge(options, embedded)
    known = getattr(find_judge(judge)[0], "questions_known", lambda given: None)({}) if judge else None
    draft = Path("concepts.yaml")
    if embedded:
        if also or options.question:
            raise ValueError(
                "also and question are for models that know more words than the embedded ones: leave it out."
            )
        concepts, name = emoji_set(options.concept, options.to, draft, protect, retain, prompts, known)
    else:
        name = bare(options.concept)
        question = options.question or next((known[one] for one in (name, *also) if known and one in known), None)
        wish = Wish(options.concept, options.to or "", options.kind, also, question, prompts)
        judged = set(known.values()) if known else None
        concepts = set_of([wish], draft, protect=protect, retain=retain, judged=judged)
    concept = concepts.concepts[name]
    if judge is not None:
        check_judge_name(judge, {}, concepts)
    arguments, data = recipe["model"].setdefault("init_args", {}), recipe["data"].setdefault("init_args", {})
    folder = Path(recipe["trainer"].get("default_root_dir", "logs"), run_name(recipe["method"], [name], concepts))
    path = folder / "concepts.yaml"
    recipe["concept"] = name
    arguments |= {"model": model, "concept_set": path.as_posix(), "judge": judge or ("emoji" if embedded else "clip")}
    if options.revision:
        arguments["revision"] = options.revision
    if not embedded:
        family = base.family.index_class if base.folder is not None else ""
        arguments |= {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE.get(family, 7.5)}
        data |= {"images_per_prompt": 1, "eval_batch_size": 4}
    given = {key: getattr(options, key) for key in ("num_inference_steps", "guidance_scale")}
    arguments |= {key: value for key, value in given.items() if value is not None}
    if options.images_per_prompt is not None:
        data["images_per_prompt"] = options.images_per_prompt
    base.check_steps(arguments["num_inference_steps"], "num_inference_steps")
    placed = concept_set_of(concepts.content(), path)
    return Plan(placed, concept, base, recipe, judge, why, embedded, options)


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything large is imported, and an output that cannot be written.

    Raises:
        ValueError: Which option, and what to do.
    """
    if options.kind not in KINDS:
        raise ValueError(f"kind={options.kind!r} is not one of {', '.join(KINDS)}.")
    for option in ("concept", "to"):
        value = getattr(options, option)
        if value is not None and not name_key(bare(value)):
            raise ValueError(f"{option}={value!r} has nothing that can be read: give a word or a phrase.")
    if options.to is not None and name_key(bare(options.to)) == name_key(bare(options.concept)):
        raise ValueError(f"to={options.to!r} is the concept itself: name what to draw in its place.")
    if options.to is None and options.model:
        raise ValueError('to is missing: say what to draw in its place, such as --to "a cartoon mouse".')
    for option in ("images_per_prompt", "num_inference_steps"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} must be at least 1.")
    if options.output is not None:
        from lit_unlearn.edits.export import output_path

        output_path(Path(options.output), "delta.safetensors" if options.delta else None, options.overwrite)


def _check_recipe(method: str, recipe: dict[str, Any]) -> None:
    """Refuse a recipe that does not edit a concept of a set.

    Raises:
        ValueError: It does not.
    """
    whole = {"method", "trainer", "model", "data"} <= set(recipe)
    if not whole or not str(recipe["data"].get("class_path")).endswith("ConceptPrompts"):
        raise ValueError(f"method={method!r} is not a recipe that edits a concept: take null_space, uce, speed or esd.")


def _judge(options: argparse.Namespace, embedded: bool) -> tuple[str | None, str]:
    """The judge that will decide, and what to say about it; None if nothing will."""
    if options.judge == "none":
        return None, "none: look at the pictures before and after"
    if options.judge is not None:
        return options.judge, f"{options.judge}, as you say"
    if embedded:
        return "emoji", "emoji, the classifier beside the embedded model"
    return "clip", "clip, which chooses among the concepts of a kind (downloaded if it is not there; or --judge llava)"


def check_drawn(plan: Plan) -> Plan:
    """Draw the concept with the unedited model and ask the judge whether it is there.

    Returns:
        The plan; without a judge if the one that was chosen by itself cannot be had.

    Raises:
        UserError: The model does not draw the concept, or the judge that was named cannot be loaded.
    """
    from dataclasses import replace

    from lit_unlearn.commands.generate import draw
    from lit_unlearn.judges.base import judge_questions
    from lit_unlearn.judges.load import load_judge
    from lit_unlearn.system.devices import explaining_memory, find_device

    judge: Judge | None = None
    if plan.judge is not None:
        try:
            judge = load_judge(plan.judge, {}, plan.concepts)
        except (OSError, UserError) as error:
            if plan.options.judge is not None:
                raise
            warn(f"the judge {plan.judge} cannot be loaded, so nothing is judged: {str(error).splitlines()[0]}")
            return replace(plan, judge=None)
    if judge is None:
        print("Not judged: whether the model draws the concept, and whether the edit works, is for you to see.")
        return plan
    device = find_device()
    prompts = list(plan.concept.prompts)
    with user_errors(), plain_warnings(), explaining_memory("erase", device, ["draw on the processor"]):
        pipeline = plan.base.load(device=device)
        batch = 8 if plan.embedded else 2
        pictures = draw(pipeline, prompts, [0], plan.steps, plan.guidance_scale, batch)
        answers = judge_questions(judge, pictures.cpu(), [plan.concept.question] * len(prompts))
    shown = int((answers >= 0.5).sum())
    found = f"the unedited model shows {plan.concept.name} on {shown} of {len(prompts)} pictures of its prompts"
    print(f"{found[0].upper()}{found[1:]} (judge: {judge.name}).")
    if shown < DRAWN * len(prompts) and not plan.options.anyway:
        raise UserError(
            f"concept={plan.options.concept!r}: {found}, so there is nothing to erase: try the name that people write "
            "in prompts, or another --judge, or --anyway."
        )
    return plan


def draw_pairs(plan: Plan, ckpt_path: str, path: Path) -> None:
    """Draw the concept's prompts with the unedited and with the edited model, into one picture.

    Raises:
        UserError: The edit cannot be applied.
        OSError: The picture cannot be written.
    """
    from lit_unlearn.commands.generate import draw
    from lit_unlearn.edits.checkpoint import load_with_pretrained, read_edit
    from lit_unlearn.evaluation.grids import before_after_grid
    from lit_unlearn.system.devices import find_device
    from lit_unlearn.system.pixels import save_png

    prompts, how = list(plan.concept.prompts), (plan.steps, plan.guidance_scale, 8 if plan.embedded else 2)
    with user_errors(), plain_warnings():
        pipeline, pretrained = load_with_pretrained(plan.base, read_edit(ckpt_path), find_device())
        after = draw(pipeline, prompts, [0], *how)
        with pretrained.restored():
            before = draw(pipeline, prompts, [0], *how)
    save_png(path, before_after_grid(before, after, prompts))


def _export(options: argparse.Namespace, ckpt_path: str, folder: Path) -> str:
    """Export the edit; the path of what was written."""
    from lit_unlearn.commands import export

    output = options.output or str(folder / ("delta.safetensors" if options.delta else "pipeline"))
    arguments = ["--ckpt_path", ckpt_path, "--output", output]
    arguments += [f"--{name}" for name in ("delta", "overwrite") if getattr(options, name)]
    _say("export", *arguments)
    export.run(export.parser().parse_args(arguments))
    return output


def _conclude(plan: Plan, folder: Path, recipe: Path, output: str) -> int:
    """Print the verdict, what was written and what to do next; the exit code."""
    from lit_unlearn.evaluation.scores import Scores
    from lit_unlearn.evaluation.verdict import Verdict, verdict_of

    verdict = Verdict(True, [f"Not judged: see {folder / 'grid.png'}, above without the edit, below with it."])
    if plan.judge is not None:
        verdict = verdict_of(Scores.load(folder / "scores.json"))
    print("\n" + "\n".join(verdict.lines))
    if not verdict.succeeded:
        others = [name for name in ("null_space_context", "uce", "speed", "esd") if name != plan.recipe["method"]]
        print(f"The edit failed. Look at the pictures; other methods are --method {', '.join(others)}.")
    where = {
        "edited model": Path(output),
        "pictures before and after": folder / "grid.png",
        "scores": folder / "scores.json",
        "concept set": plan.concepts.path,
        "recipe": recipe,
        "everything else of the run": folder,
    }
    print()
    for what, path in where.items():
        if path.exists():
            print(f"  {what + ':':28}{path}")
    again = _command("fit", "--config", str(recipe), "--concept", plan.concept.name)
    print(f"\nThe same edit again, as a recipe:\n  {again}")
    return 0 if verdict.succeeded else 1


def _command(*args: str) -> str:
    return shlex.join(["lit-unlearn", *args])


def _say(*args: str) -> None:
    print(f"\n$ {_command(*args)}", flush=True)
