from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lit_unlearn.reports.comparison import GAIN, Column, comparison_page


def pictures_of(page: str) -> list[np.ndarray]:
    """The pictures on a page, in their order."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_page_has_pictures_verdicts_and_enlarged_differences() -> None:
    before, after = torch.full((1, 3, 8, 8), 0.2), torch.full((1, 3, 8, 8), 0.4)
    unedited = Column("unedited", before, {"dog": torch.tensor([0.9])})
    edited = Column("uce: dog", after, {"dog": torch.tensor([0.1])})
    page = comparison_page("Side by side", "emoji-sd.", [("a <dog>", 7)], unedited, [edited])
    values = [int(picture[0, 0, 0]) for picture in pictures_of(page)]
    assert values == [51, 102, round(GAIN * 0.2 * 255)]
    assert "distance 0.200" in page
    said = re.findall(r'<span class="(\w+)">(.*?)</span>', page)
    assert said == [("shows", "dog: yes 0.90"), ("hides", "dog: no 0.10")]
    assert "a &lt;dog&gt;" in page and "a <dog>" not in page
    assert "seed 7" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)


@pytest.mark.parametrize(("side", "kind", "smooth"), [(48, "png", False), (128, "png", False), (512, "webp", True)])
def test_small_pictures_are_exact_and_large_ones_small(side: int, kind: str, smooth: bool) -> None:
    column = Column("unedited", torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)), {})
    page = comparison_page("t", "h", [("a", 0)], column, [])
    assert f"data:image/{kind}" in page
    assert ("image-rendering: pixelated" in page) is not smooth
