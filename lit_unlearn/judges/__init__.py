"""Judges of real pictures: vision-language models, zero-shot CLIP, a nudity detector; and a cache of their answers."""
