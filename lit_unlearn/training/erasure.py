"""What the erasure of a concept by its name needs: a concept set, a judge and a recipe, all checked.

Data flow: a ``Request`` is checked and becomes a ``Plan``, and no model is loaded for that; ``check_drawn`` draws the
concept with the unedited model and asks the judge whether it is there; ``Plan.write`` writes the concept set and the
recipe, with which ``fit``, ``test`` and ``export`` are then called as a user would.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_unlearn.data.kinds import KINDS
from lit_unlearn.data.names import bare, name_key
from lit_unlearn.system.errors import UserError, plain_warnings, user_errors, warn
from lit_unlearn.system.run_file import check_checkpoint
from lit_unlearn.training.recipes import find_recipe

if TYPE_CHECKING:
    from lit_unlearn.data.concepts import Concept, ConceptSet
    from lit_unlearn.diffusion.base_model import BaseModel
    from lit_unlearn.edits.checkpoint import Edit
    from lit_unlearn.judges.base import Judge

DRAWN = 0.2
"""Least share of the unedited model's pictures that must show the concept."""
STEPS = 30
GUIDANCE = {
    **{"FluxPipeline": 3.5, "StableDiffusion3Pipeline": 7.0, "StableDiffusionXLPipeline": 5.0},
    **dict.fromkeys(("PixArtAlphaPipeline", "PixArtSigmaPipeline"), 4.5),
}
"""Denoising steps and guidance for models that are not the embedded ones; 7.5 for other families."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        concept: What to erase, as people write it.
        to: What to draw in its place; None for the target in ``emoji20``.
        kind: One of ``KINDS``.
        also: Further words for it, by commas.
        protect: Neighbours that must stay, by commas.
        retain: File of prompts that must stay.
        prompts: File of prompts of the concept to judge too.
        method: Name of a recipe; None for the usual one.
        model: Folder, file or hub id; None for ``emoji-sd``.
        revision: Branch, tag or commit of a hub id.
        judge: Name of the judge, ``none``, or None for the usual one.
        question: Question to the judge; None for the kind's.
        images_per_prompt: Pictures of each prompt.
        num_inference_steps: Denoising steps; None for the usual number.
        guidance_scale: Classifier-free guidance; None for the family's usual.
        delta: Whether only the changed weights will be exported.
        anyway: Whether to edit even if the model does not draw the concept.
        folder: Folder of the runs; None for the recipe's.
        base_edit: Earlier edits to start from: folders of runs, checkpoints or deltas.
        clip_skip: Layers that prompts are read earlier; None for none.
    """

    concept: str
    to: str | None = None
    kind: str = "object"
    also: Sequence[str] = ()
    protect: Sequence[str] = ()
    retain: str | None = None
    prompts: str | None = None
    method: str | None = None
    model: str | None = None
    revision: str | None = None
    judge: str | None = None
    question: str | None = None
    images_per_prompt: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    delta: bool = False
    anyway: bool = False
    folder: str | None = None
    base_edit: Sequence[str] = ()
    clip_skip: int | None = None


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
        request: What is asked for.
        edits: The edits to start from.
    """

    concepts: ConceptSet
    concept: Concept
    base: BaseModel
    recipe: dict[str, Any]
    judge: str | None
    why: str
    embedded: bool
    request: Request
    edits: Sequence[Edit] = ()

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
        space = "the changed weights" if self.request.delta else f"the edited model ({size / 1e6:,.0f} MB)"
        judged = "" if self.judge is None else ", which are judged too"
        below = ", ".join(self.recipe.get("base_edit", ()))
        skipped = "" if self.base.clip_skip is None else f", clip_skip {self.base.clip_skip}"
        return [
            f"erase     {self.concept.name} ({self.concept.kind}), to draw {self.concept.target} instead",
            f"model     {self.base.name}{f', as edited by {below}' if below else ''}{skipped}",
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


def plan_of(request: Request) -> Plan:
    """Make the concept set and choose judge and recipe, without loading a model.

    Raises:
        ValueError: Something that was asked for is wrong; the message names it.
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
    from lit_unlearn.training.ledger import checked_together, read_earlier
    from lit_unlearn.training.runs import run_name

    protect, also = split_names(request.protect), tuple(split_names(request.also, "also"))
    retain = [row.prompt for row in read_prompts(request.retain, "retain")] if request.retain else []
    prompts = tuple(row.prompt for row in read_prompts(request.prompts)) if request.prompts else ()
    model = request.model or EMBEDDED
    base = BaseModel.find(model, request.revision, clip_skip=request.clip_skip)
    shipped = [folder.resolve() for name in SHIPPED if (folder := shipped_folder(name))]
    embedded = isinstance(base.place, Path) and base.place.resolve() in shipped
    method = request.method or ("null_space_context" if request.model else "null_space")
    recipe = yaml.safe_load(find_recipe(method).read_text(encoding="utf-8"))
    _check_recipe(method, recipe)
    judge, why = _judge(request, embedded)
    known = getattr(find_judge(judge)[0], "questions_known", lambda given: None)({}) if judge else None
    draft = Path("concepts.yaml")
    if embedded:
        if also or request.question:
            raise ValueError(
                "also and question are for models that know more words than the embedded ones: leave it out."
            )
        concepts, name = emoji_set(request.concept, request.to, draft, protect, retain, prompts, known)
    else:
        name = bare(request.concept)
        question = request.question or next((known[one] for one in (name, *also) if known and one in known), None)
        wish = Wish(request.concept, request.to or "", request.kind, also, question, prompts)
        judged = set(known.values()) if known else None
        concepts = set_of([wish], draft, protect=protect, retain=retain, judged=judged)
    edits = [read_earlier(place, base) for place in request.base_edit]
    checked_together(edits, recipe["model"].get("init_args", {}).get("dtype", "float32"))
    concepts = _with_earlier(concepts, name, edits)
    concept = concepts.concepts[name]
    if judge is not None:
        check_judge_name(judge, {}, concepts)
    arguments, data = recipe["model"].setdefault("init_args", {}), recipe["data"].setdefault("init_args", {})
    if request.folder is not None:
        recipe["trainer"]["default_root_dir"] = Path(request.folder).as_posix()
    every = [*dict.fromkeys(earlier for edit in edits for earlier in edit.concepts), name]
    folder = Path(recipe["trainer"].get("default_root_dir", "logs"), run_name(recipe["method"], every, concepts))
    path = folder / "concepts.yaml"
    recipe["concept"] = name
    if edits:
        recipe["base_edit"] = [edit.path.as_posix() for edit in edits]
    arguments |= {"model": model, "concept_set": path.as_posix(), "judge": judge or "clip"}
    if request.revision:
        arguments["revision"] = request.revision
    if request.clip_skip is not None:
        arguments["clip_skip"] = request.clip_skip
    if not embedded:
        family = base.family.index_class if base.folder is not None else ""
        arguments |= {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE.get(family, 7.5)}
        data |= {"images_per_prompt": 1, "eval_batch_size": 4}
    given = {key: getattr(request, key) for key in ("num_inference_steps", "guidance_scale")}
    arguments |= {key: value for key, value in given.items() if value is not None}
    if request.images_per_prompt is not None:
        data["images_per_prompt"] = request.images_per_prompt
    base.check_steps(arguments["num_inference_steps"], "num_inference_steps")
    placed = concept_set_of(concepts.content(), path)
    return Plan(placed, concept, base, recipe, judge, why, embedded, request, tuple(edits))


def _with_earlier(concepts: ConceptSet, name: str, edits: Sequence[Edit]) -> ConceptSet:
    """The set with the concepts of earlier edits as those were made with them, so that they are kept and judged.

    Raises:
        ValueError: One of them is the concept to erase, or its edit does not say how it was described.
    """
    from lit_unlearn.data.concepts import concept_set_of

    content = concepts.content()
    for edit in edits:
        for earlier in edit.concepts:
            described = ((edit.concept_set or {}).get("concepts") or {}).get(earlier)
            if earlier == name or described is None:
                why = "already: erase something else"
                if described is None:
                    why = "and does not say with which prompts: use fit, with a set that has it, and --base_edit"
                raise ValueError(f"base_edit={edit.path} edits {earlier!r} {why}.")
            content["concepts"][earlier] = described
    found = concept_set_of(content, concepts.path)
    for edit in edits:
        for earlier in edit.concepts:
            if found.concepts[earlier].find_name(concepts.concepts[name].target):
                raise ValueError(
                    f"to={concepts.concepts[name].target!r} is edited by base_edit={edit.path} ({earlier}): name what "
                    "the edited model still draws."
                )
    return found


def check_request(request: Request) -> None:
    """Refuse what can be refused before anything large is imported.

    Raises:
        ValueError: Which option, and what to do.
    """
    if request.kind not in KINDS:
        raise ValueError(f"kind={request.kind!r} is not one of {', '.join(KINDS)}.")
    for option in ("concept", "to"):
        value = getattr(request, option)
        if value is not None and not name_key(bare(value)):
            raise ValueError(f"{option}={value!r} has nothing that can be read: give a word or a phrase.")
    if request.to is not None and name_key(bare(request.to)) == name_key(bare(request.concept)):
        raise ValueError(f"to={request.to!r} is the concept itself: name what to draw in its place.")
    for place in request.base_edit:
        check_checkpoint(place, "base_edit")
    if request.to is None and request.model:
        raise ValueError('to is missing: say what to draw in its place, such as --to "a cartoon mouse".')
    for option in ("images_per_prompt", "num_inference_steps"):
        value = getattr(request, option)
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} must be at least 1.")


def _check_recipe(method: str, recipe: dict[str, Any]) -> None:
    """Refuse a recipe that does not edit a concept of a set.

    Raises:
        ValueError: It does not.
    """
    whole = {"method", "trainer", "model", "data"} <= set(recipe)
    if not whole or not str(recipe["data"].get("class_path")).endswith("ConceptPrompts"):
        raise ValueError(f"method={method!r} is not a recipe that edits a concept: take null_space, uce, speed or esd.")


def _judge(request: Request, embedded: bool) -> tuple[str | None, str]:
    """The judge that will decide, and what to say about it; None if nothing will."""
    if request.judge == "none":
        return None, "none: look at the pictures before and after"
    if request.judge is not None:
        return request.judge, f"{request.judge}, as you say"
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

    from lit_unlearn.edits.drawing import draw_all
    from lit_unlearn.judges.base import judge_questions
    from lit_unlearn.judges.load import load_judge
    from lit_unlearn.system.devices import explaining_memory, find_device

    judge: Judge | None = None
    if plan.judge is not None:
        try:
            judge = load_judge(plan.judge, {}, plan.concepts)
        except (OSError, UserError) as error:
            if plan.request.judge is not None:
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
        for edit in plan.edits:
            edit.apply(pipeline, plan.base)
        batch = 8 if plan.embedded else 2
        pictures = draw_all(pipeline, prompts, [0], plan.steps, plan.guidance_scale, batch)
        answers = judge_questions(judge, pictures.cpu(), [plan.concept.question] * len(prompts))
    shown = int((answers >= 0.5).sum())
    which = "the model, as edited so far," if plan.edits else "the unedited model"
    found = f"{which} shows {plan.concept.name} on {shown} of {len(prompts)} pictures of its prompts"
    print(f"{found[0].upper()}{found[1:]} (judge: {judge.name}).")
    if shown < DRAWN * len(prompts) and not plan.request.anyway:
        raise UserError(
            f"concept={plan.request.concept!r}: {found}, so there is nothing to erase: try the name that people write "
            "in prompts, or another --judge, or --anyway."
        )
    return plan
