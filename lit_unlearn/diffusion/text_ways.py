"""The ways on which text enters a denoiser, and the linear maps that read it first.

    tokens      states of all positions: attn2.to_k and attn2.to_v of a UNet, the context embedder of a transformer
    pooled      one vector for each prompt: the embedder that adds it to the timestep's

No edit of these maps moves their own inputs, the text encoders' outputs, so that one solve writes all targets.
"""

from __future__ import annotations

import re

WAYS = {
    "tokens": r"^unet\..*attn2\.to_[kv]\.weight$|^transformer\.context_embedder\.weight$",
    "pooled": r"^unet\.add_embedding\.linear_1\.weight$"
    r"|^transformer\.time_text_embed\.text_embedder\.linear_1\.weight$",
}
"""For each way, the full names of the weights that read it first."""


def way_of(name: str) -> str | None:
    """The way that the weight with the full name ``name`` reads first; None for another weight."""
    return next((way for way, pattern in WAYS.items() if re.search(pattern, name)), None)
