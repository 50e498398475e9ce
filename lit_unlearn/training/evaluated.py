"""What ``validate``, ``test`` and ``predict`` take from a checkpoint instead of the command line."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lit_unlearn.edits.base import check_clip_skip
from lit_unlearn.edits.checkpoint import Edit
from lit_unlearn.system.errors import user_errors, warn
from lit_unlearn.training.classes import import_named, known_classes
from lit_unlearn.training.options import ignored_by_a_checkpoint

FROM_COMMAND_LINE = {"concept", "concept_set", "model", "revision", "config_folder", "copy_quantile"}
FROM_COMMAND_LINE |= {"judge", "judge_options", "second_judge", "second_judge_options", "judge_cache", "spontaneous"}
FROM_COMMAND_LINE |= {"num_inference_steps", "guidance_scale", "offload", "torch_compile"}
"""Arguments of a model that say what is evaluated and how; all others belong to the edit and are in its checkpoint."""


def as_its_fit_made_it(subcommand: str, config: Any, edit: Edit, given: Collection[str]) -> dict[str, Any]:
    """The parts ``model`` and ``edit`` of a configuration, as the fit had them; warns of what is asked in vain.

    Args:
        subcommand: The command.
        config: Its configuration.
        edit: The edit in its checkpoint.
        given: Keys that are set on the command line.

    Raises:
        UserError: Another clip skip is asked for.
    """
    if (asked := config.model.init_args.clip_skip) is not None:
        with user_errors():
            check_clip_skip(edit, asked, "leave model.clip_skip out")
    kept = {k: v for k, v in edit.hyper_parameters.items() if k not in FROM_COMMAND_LINE and k != "_class_path"}
    import_named(str(edit.edit))
    solver = edit.edit if edit.edit and str(edit.edit.get("class_path")) in known_classes() else None
    if ignored := ignored_by_a_checkpoint(config, given, kept, edit.edit):
        warn(f"{edit.path} is {subcommand}ed as its fit has made it, whatever is asked: {', '.join(ignored)}.")
    return {"model": {"class_path": config.model.class_path, "init_args": kept}, "edit": solver}
