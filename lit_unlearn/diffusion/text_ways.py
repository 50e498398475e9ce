"""The ways on which text enters a denoiser, and the linear maps that read it first.

    tokens      states of all positions: attn2.to_k and attn2.to_v of a UNet, the context embedder of a transformer, or
                the first layer of its caption projection
    pooled      one vector for each prompt: the embedder that adds it to the timestep's

No edit of these maps moves their own inputs, the text encoders' outputs, so that one solve writes all targets. A
transformer with a caption projection also has cross-attention, and what that reads depends on the prompt alone too:

    projected   the projected states of all positions: attn2.to_k and attn2.to_v of such a transformer

Only an edit of the projection moves these inputs.
"""

from __future__ import annotations

import re

WAYS = {
    "tokens": r"^unet\..*attn2\.to_[kv]\.weight$"
    r"|^transformer\.(context_embedder|caption_projection\.linear_1)\.weight$",
    "pooled": r"^unet\.add_embedding\.linear_1\.weight$"
    r"|^transformer\.time_text_embed\.text_embedder\.linear_1\.weight$",
    "projected": r"^transformer\..*\.attn2\.to_[kv]\.weight$",
}
"""For each way, the full names of the weights that read it first, in the families that have it (``Pipeline.ways``)."""
FIRST = ("tokens", "pooled")
"""The ways that nothing has to be computed for besides the text encoders."""


def way_of(name: str) -> str | None:
    """The way that the weight with the full name ``name`` reads first; None for another weight."""
    return next((way for way, pattern in WAYS.items() if re.search(pattern, name)), None)
