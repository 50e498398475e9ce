from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_unlearn.evaluation.quality import PairedDrift, SetDistance, check_features, inception_features, of_bytes


def pictures(n: int, seed: int) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def means(images: Tensor) -> Tensor:
    """Mean colours, (B, 3): features that a person can follow."""
    return images.mean(dim=(2, 3))


def test_drift_equals_a_plain_computation_in_any_batches() -> None:
    before, after = pictures(5, 0), pictures(5, 1)
    metric = PairedDrift(means)
    for part in ((0, 2), (2, 5)):
        metric.update(before[slice(*part)], after[slice(*part)])
    drift = metric.compute()
    mse = [float((b - a).double().square().mean()) for b, a in zip(before, after, strict=True)]
    assert drift["rmse"] == pytest.approx(sum(math.sqrt(m) for m in mse) / 5, rel=1e-6)
    assert drift["psnr"] == pytest.approx(10 * math.log10(5 / sum(mse)), rel=1e-6)
    distances = [
        1 - float(torch.nn.functional.cosine_similarity(means(b[None]).double(), means(a[None]).double()))
        for b, a in zip(before, after, strict=True)
    ]
    assert drift["features"] == pytest.approx(sum(distances) / 5, rel=1e-5)
    assert drift["pictures"] == 5


def test_nothing_moved_and_nothing_seen() -> None:
    metric = PairedDrift(means)
    metric.update(pictures(0, 0), pictures(0, 0))
    assert metric.compute() == {}
    metric = PairedDrift(means)
    metric.update(pictures(2, 0), pictures(2, 0))
    drift = metric.compute()
    assert (drift["rmse"], drift["psnr"]) == (0, math.inf)
    assert drift["features"] == pytest.approx(0, abs=1e-12)
    plain = PairedDrift()
    plain.update(pictures(2, 0), pictures(2, 1))
    assert set(plain.compute()) == {"rmse", "psnr", "pictures"}


def unbiased_kid(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD with the kernel (xᵀy/d + 1)³ (Bińkowski et al., 2018), by loops."""
    n, d = x.shape

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / d + 1) ** 3

    same = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return same - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def distances(before: Tensor, after: Tensor, features: Callable[[Tensor], Tensor] = means) -> dict[str, float | None]:
    """All distances between two sets of pictures, uint8, entered in two unequal parts."""
    metric = SetDistance(of_bytes(features))
    for part in (slice(0, 2), slice(2, None)):
        metric.update(before[part], after[part])
    return metric.compute()


def test_kid_equals_its_definition() -> None:
    before, after = ((pictures(6, seed) * 255).byte() for seed in (0, 1))
    after = after // 2
    found = distances(before, after)
    # Six pictures are fewer than a subset, so all subsets are alike but for their order.
    expected = unbiased_kid(means(before.float() / 255).double(), means(after.float() / 255).double())
    assert found["kid"] == pytest.approx(expected, rel=1e-4)
    assert found["kid_std"] is not None
    assert found["kid_std"] < 1e-5 < expected


def square_root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def frechet(x: Tensor, y: Tensor) -> float:
    """‖μ − ν‖² + tr(A + B − 2 (A^½ B A^½)^½) with the means and covariances of rows (Dowson & Landau, 1982)."""
    sigma, tau = torch.cov(x.mT), torch.cov(y.mT)
    root = square_root(sigma)
    mean = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    return float(mean + (sigma + tau).trace() - 2 * square_root(root @ tau @ root).trace())


class TinyNetwork(torch.nn.Module):
    """Stands for Inception: random convolutions with five features, of pictures in [0, 1], in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 5, 3, stride=2, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images.double()).relu().mean(dim=(2, 3))


def test_fid_equals_its_closed_form() -> None:
    network = TinyNetwork()
    before, after = (pictures(40, 0) * 255).byte(), (pictures(40, 1).square() * 255).byte()
    with torch.no_grad():
        features = [network(images.float() / 255) for images in (before, after)]
    expected = frechet(*features)
    assert expected > 0.1
    assert distances(before, after, network)["fid"] == pytest.approx(expected, rel=1e-9)
    assert distances(before, before, network)["fid"] == pytest.approx(0, abs=1e-9)


def test_fid_needs_more_pictures_than_features() -> None:
    network = TinyNetwork()
    before, after = ((pictures(6, seed) * 255).byte() for seed in (0, 1))
    few = distances(before[:5], after[:5], network)
    assert few["fid"] is None
    assert few["kid"] is not None
    assert distances(before, after, network)["fid"] is not None


def test_distances_are_reproducible_and_leave_the_global_state_alone() -> None:
    before, after = (pictures(80, 0) * 255).byte(), (pictures(80, 1).sqrt() * 255).byte()
    state = torch.random.get_rng_state()
    first = distances(before, after)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert distances(before, after) == first
    assert SetDistance(of_bytes(means)).compute() == {}


def test_features_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="features='clip' is unknown: choose judge or inception"):
        check_features("clip")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_features("judge")
    with pytest.raises(ValueError, match=r"pip install 'lit-unlearn\[fid\]'"):
        check_features("inception")


def fidelity() -> None:
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity: pip install 'lit-unlearn[fid]'")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that torch-fidelity keeps its weights in, in an empty folder."""
    fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    return tmp_path / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]


def test_inception_without_its_weights(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(
        ValueError, match=r"cannot be loaded \(no network here\): put that file at .*pth, or choose"
    ) as error:
        inception_features()
    assert str(hub) in str(error.value)
    hub.parent.mkdir(parents=True, exist_ok=True)
    hub.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"cannot be loaded .*: put that file at .*pth, or choose features='judge'\.$"):
        inception_features()


@pytest.mark.slow
def test_inception_with_weights(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in place of the real ones: everything but their values."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        network = inception_features()
    hub.parent.mkdir(parents=True)
    torch.save(network.state_dict(), hub)  # type: ignore[attr-defined]
    images = (pictures(3, 0) * 255).byte()
    loaded = inception_features()
    features = loaded(images)
    assert features.shape == (3, 2048)
    assert features.std(dim=0).max() > 0
    assert torch.equal(features, network(images))
    metric = SetDistance(loaded)
    metric.update(images, images // 2)
    found = metric.compute()
    assert metric.num_features == 2048
    assert found["fid"] is None  # three pictures
    assert found["kid"] is not None
