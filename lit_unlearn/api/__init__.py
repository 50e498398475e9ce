"""Python: edit a model, draw, score, attack and export it, with a few functions that the commands call as well.

    import lit_unlearn as lu

    edit = lu.edit("dog", recipe="uce")                  # fit     -> Edit: a run's checkpoint
    pictures = lu.draw(edit, ["a dog on a beach"])       # generate -> Pillow pictures
    scores = lu.score(edit)                              # test    -> scores.json as a dictionary
    found = lu.attack(edit, "ring_a_bell")               # attack  -> results, one for each attack and concept
    lu.export(edit, "dog.safetensors", format="delta")   # export  -> path of what was written
    more = lu.edit("owl", recipe="uce", base_edit=edit)  # on top of that edit, which stays
    lu.undo(more, "owl", "dog.safetensors")              # undo    -> Edit: the others, in a delta

Data flow: ``edit`` writes a run's folder as ``lit-unlearn fit`` does and returns an ``Edit``, which stands for the
checkpoint in it. All others take an ``Edit``, or the path of a run's folder, of a checkpoint or of a delta. ``draw``
also takes a pipeline (``Pipeline.load``, ``Edit.pipeline``). What is written lies where the command would write it, and
nothing is replaced without ``overwrite``.

A mistake in what was given raises ``UserError``, with the sentence that the command prints: it names options by their
names on the command line (``--overwrite`` is ``overwrite=True`` here). A folder that cannot be written raises
``OSError``. Random numbers of the process go on after each call as if it had drawn none. The first use of a name
switches off the advice that transformers and diffusers print on import, unless ``TRANSFORMERS_VERBOSITY`` and
``DIFFUSERS_VERBOSITY`` are set.
"""

from lit_unlearn.api.after import attack, export, undo
from lit_unlearn.api.edited import Edit
from lit_unlearn.api.fitting import edit, score
from lit_unlearn.api.pictures import draw, grid

__all__ = ["Edit", "attack", "draw", "edit", "export", "grid", "score", "undo"]
