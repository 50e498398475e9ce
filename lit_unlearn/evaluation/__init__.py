"""Does a picture show a concept: judges, the forget and retain metric, scores of a run and grids of pictures.

``judges`` says what a judge is, ``metrics`` counts its verdicts, ``scores`` keeps them in ``scores.json`` and prints
them, ``pictures`` puts pictures of the same seeds side by side, ``files`` writes without ever leaving half a file.
"""
