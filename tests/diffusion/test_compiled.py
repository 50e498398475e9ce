"""Compiled kernels draw the same pictures to their last bits, follow the weights, and are used for pictures only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_unlearn.diffusion.compiled import (
    _checked_once,
    check_compiler,
    compile_drawing,
    compiled_forward,
    is_compiled,
)
from lit_unlearn.diffusion.drawing import Drawing
from lit_unlearn.diffusion.families import StableDiffusion
from lit_unlearn.diffusion.load import load_pipeline
from lit_unlearn.diffusion.pipeline import Pipeline
from lit_unlearn.methods.esd import ESD
from lit_unlearn.system.errors import UserError

STEPS = 3
CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the compiler by one that changes nothing: the names of the modules that are called as compiled."""
    made: list[str] = []

    def compile_nothing(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            made.append(type(module).__name__)
            return forward(module, *args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    return made


def draw(pipeline: Pipeline, count: int = 2) -> Tensor:
    return pipeline.draw(["a dog", "a cat", "a castle"][:count], list(range(count)), STEPS, 4.0)


def test_pictures_are_drawn_with_compiled_kernels_and_nothing_else_is(
    components: StableDiffusion, calls: list[str]
) -> None:
    before = draw(components)
    assert calls == []
    compile_drawing(components)
    assert torch.equal(draw(components), before)
    assert calls == ["UNet2DConditionModel"] * STEPS + ["Decoder"]
    calls.clear()
    condition = components.encode(["a dog"])
    components.predict(components.initial_noise([0]), torch.tensor(10), condition)
    list(components.chain([condition], components.initial_noise([0]), STEPS, 1.0))
    assert calls == []
    assert not any("forward" in vars(module) for part in components.parts.values() for module in part.modules())


def test_an_error_within_leaves_the_model_as_it_was(components: StableDiffusion, calls: list[str]) -> None:
    compile_drawing(components)
    with pytest.raises(RuntimeError):
        components.sample(components.encode(["a dog"]), torch.zeros(1, 3, 8, 8), STEPS, 1.0)  # three channels, not four
    assert calls and "forward" not in vars(components.unet)


def test_guards_are_checked_at_the_first_step_and_for_other_arguments(
    components: StableDiffusion, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_drawing(components)
    skipped: list[int] = []

    def stance(*, skip_guard_eval_unsafe: bool) -> Any:
        assert skip_guard_eval_unsafe
        skipped.append(len(calls))
        return nullcontext()

    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    draw(components)
    draw(components, 3)
    assert len(skipped) == 2 * (STEPS - 1)  # the first step of each chain is checked, and the decoder
    skipped.clear()
    x, condition = components.initial_noise([0, 1]), components.encode(["a dog", "a cat"])
    with compiled_forward(components.unet), torch.no_grad():
        components.predict(x, torch.tensor(10), condition)
        components.predict(x, torch.tensor(20), condition)
        components.predict(x[:1], torch.tensor(20), condition[:1])
        components.predict(x[:1], torch.tensor([20]), condition[:1])
    assert len(skipped) == 1


class Layers(nn.Module):
    """Layers one after the other; PyTorch compiles this ``forward`` anew for each number of them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Broken(nn.Module):
    """A layer that PyTorch cannot compile in one piece, and each number anew."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + self.number


@pytest.fixture
def compiled() -> Iterator[Callable[..., Tensor]]:
    """``Layers.forward``, compiled without a compiler of C++."""
    torch._dynamo.reset()
    yield torch.compile(Layers.forward, backend="eager")
    torch._dynamo.reset()


def computes_the_same(compiled: Callable[..., Tensor], module: nn.Module) -> bool:
    forward, x = _checked_once(partial(compiled, module)), torch.ones(2, 3)
    with torch.no_grad():
        return all(torch.equal(forward(x), module(x)) for _ in range(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_behind_the_limit_of_kernels_guards_are_checked_at_every_call(compiled: Callable[..., Tensor]) -> None:
    for count in range(1, torch._dynamo.config.recompile_limit + 3):
        assert computes_the_same(compiled, Layers(*[nn.Linear(3, 3)] * count))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_in_several_pieces(compiled: Callable[..., Tensor]) -> None:
    assert computes_the_same(compiled, Layers(*map(Broken, range(3))))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_user_who_has_told_pytorch_to_compile_nothing(compiled: Callable[..., Tensor]) -> None:
    with torch.compiler.set_stance("force_eager"):
        assert computes_the_same(compiled, Layers(nn.Linear(3, 3)))


def test_what_pytorch_cannot_compile_is_told_in_a_sentence(
    components: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: Any) -> Any:
        raise ImportError("/cache/27/kernel.so: file too short\nand more")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=damaged))
    compile_drawing(components)
    with pytest.raises(UserError) as caught:
        components.draw(["a dog"], [0], 1, 1.0)
    assert str(caught.value) == (
        "PyTorch cannot compile the UNet2DConditionModel (ImportError: /cache/27/kernel.so: file too short). If a run "
        "was interrupted while it compiled, delete PyTorch's cache /cache and run again; else omit torch_compile."
    )
    assert "forward" not in vars(components.denoiser)


def test_an_error_of_the_model_is_its_own() -> None:
    asked: list[Tensor] = []

    def fails_later(x: Tensor) -> Tensor:
        asked.append(x)
        if len(asked) == 2:
            raise RuntimeError("out of memory")
        return x

    forward = _checked_once(fails_later)
    forward(torch.ones(1))
    with pytest.raises(RuntimeError, match="out of memory"):
        forward(torch.ones(1))
    assert len(asked) == 2  # it is not tried again


def test_a_part_that_something_else_has_hold_of_is_refused(components: StableDiffusion) -> None:
    components.unet.forward = components.unet.forward
    with pytest.raises(ValueError, match="torch_compile cannot be used with this UNet2DConditionModel"):
        compile_drawing(components)


def test_a_copy_of_a_model_is_not_compiled(components: StableDiffusion, calls: list[str]) -> None:
    compile_drawing(components)
    copied = copy.deepcopy(components)
    assert is_compiled(components.unet) and not is_compiled(copied.unet)
    assert torch.equal(draw(copied), draw(components))
    assert calls.count("Decoder") == 1


def test_pictures_with_and_without_are_kept_apart(components: StableDiffusion, calls: list[str]) -> None:
    plain = Drawing.of(components, STEPS, 4.0)
    compile_drawing(components)
    compiled = Drawing.of(components, STEPS, 4.0)
    assert (plain.compiled, compiled.compiled) == (False, True)
    assert plain.key != compiled.key


def test_what_compiling_needs_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler(CPU, "torch_compile")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="torch_compile needs a compiler of C\\+\\+, and there is no no-such-compiler"):
        check_compiler(CPU, "torch_compile")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.torch_compile needs Triton on cuda"):
        check_compiler(torch.device("cuda"), "model.torch_compile")


def test_a_missing_compiler_is_told_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ESD(concept="dog", torch_compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(module.base, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"model\.torch_compile needs a compiler"):
        module.configure_model()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's, of what its compiler imports
@pytest.mark.parametrize(
    ("model", "backend"),
    # The kernels take a minute of a compiler of C++; the other backend leaves out this last step.
    [
        ("tiny_sd", "inductor"),
        ("tiny_sd", "aot_eager"),
        ("tiny_sdxl", "aot_eager"),
        ("tiny_sd3", "aot_eager"),
        ("tiny_flux", "aot_eager"),
        ("tiny_pixart", "aot_eager"),
    ],
)
def test_compiled_pictures_are_the_same_and_follow_the_weights(
    model: str, backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    folder: Path = request.getfixturevalue(model)
    plain, compiled = load_pipeline(str(folder)), load_pipeline(str(folder))
    compile_drawing(compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = draw(compiled)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made > 0
    assert (before - draw(plain)).abs().max() < 1e-4
    for pipeline in (plain, compiled):
        for parameter in pipeline.denoiser.parameters():
            parameter.data.mul_(1.2)
    after = draw(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made
    assert (after - before).abs().max() > 1e-2
    assert (after - draw(plain)).abs().max() < 1e-4
