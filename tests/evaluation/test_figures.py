"""The figure of the spectrum."""

from __future__ import annotations

import pytest

from lit_unlearn.evaluation.figures import spectrum_figure


def test_spectrum_is_drawn_relative_to_its_mean_and_split_at_the_cutoff() -> None:
    figure = spectrum_figure({"layer 1": [0.0, 1.0, 2.0, 9.0]}, {"layer 1": 1.5})
    kept_out, null_space = figure.axes[0].get_lines()
    assert kept_out.get_ydata() == pytest.approx([9 / 3, 2 / 3])
    assert null_space.get_ydata() == pytest.approx([1 / 3, 1e-12])
    assert list(null_space.get_xdata()) == [3, 4]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["layer 1"]
