"""The figure of the spectrum."""

from __future__ import annotations

import pytest

from lit_unlearn.reports.figures import encoder_spectra_figure, spectrum_figure


def test_spectrum_is_drawn_relative_to_its_mean_and_split_at_the_cutoff() -> None:
    figure = spectrum_figure({"layer 1": [0.0, 1.0, 2.0, 9.0]}, {"layer 1": 1.5})
    kept_out, null_space = figure.axes[0].get_lines()
    assert kept_out.get_ydata() == pytest.approx([9 / 3, 2 / 3])
    assert null_space.get_ydata() == pytest.approx([1 / 3, 1e-12])
    assert list(null_space.get_xdata()) == [3, 4]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["layer 1"]


def test_encoders_stand_side_by_side_each_layer_relative_to_its_own_mean() -> None:
    spectra = {
        "text encoder": {"layer 1": [0.0, 1.0, 2.0, 9.0]},
        "UNet": {"mid 0 K": [10.0, 30.0], "mid 0 V": [1.0, 1.0]},
    }
    figure = encoder_spectra_figure(spectra, {"text encoder": 0.01, "UNet": 0.3})
    text, unet = figure.axes
    assert [axes.get_title() for axes in figure.axes] == list(spectra)
    line, threshold = text.get_lines()
    assert line.get_ydata() == pytest.approx([9 / 3, 2 / 3, 1 / 3, 1e-12])
    assert line.get_xdata() == pytest.approx([0.125, 0.375, 0.625, 0.875])
    assert list(threshold.get_ydata()) == [0.01, 0.01]
    assert [list(line.get_ydata()) for line in unet.get_lines()] == [[1.5, 0.5], [1.0, 1.0], [0.3, 0.3]]
    assert text.get_ylim() == unet.get_ylim()
    assert [entry.get_text() for entry in unet.get_legend().get_texts()] == ["mid 0 K", "mid 0 V"]


@pytest.mark.parametrize(
    ("spectra", "problem"), [({}, "spectra is empty"), ({"UNet": {"mid 0 K": [1.0, 2.0]}}, "thresholds lacks UNet")]
)
def test_what_cannot_be_drawn(spectra: dict[str, dict[str, list[float]]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        encoder_spectra_figure(spectra, {})
