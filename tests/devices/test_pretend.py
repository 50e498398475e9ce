"""The device refuses what a GPU refuses, and nothing beside it."""

from __future__ import annotations

import pytest

from devices.workers import Workers

ON = "torch.ones(2, 2, device=device)"
GENERATOR = "torch.Generator().manual_seed(0)"
ROW = "torch.tensor([0])"

REFUSED = {
    "two devices": (
        f"{ON} + torch.ones(2, 2)",
        "Refused",
        "to be on the same device",
        f"{ON} + torch.ones(2).to(device)",
    ),
    "two devices in a list": (
        f"torch.cat([{ON}, torch.ones(2, 2)])",
        "Refused",
        "same device",
        f"torch.cat([{ON}] * 2)",
    ),
    "two devices, in place": (f"{ON}.add_(torch.ones(2))", "Refused", "same device", f"{ON}.copy_(torch.ones(2))"),
    "a vector with a number of the device": (
        f"{ON}.sum() * torch.ones(2)",
        "Refused",
        "same",
        f"{ON} * torch.tensor(2.0)",
    ),
    "a comparison with the processor": (
        f"torch.equal({ON}, {ON}.cpu())",
        "Refused",
        "same",
        f"torch.equal({ON}, {ON})",
    ),
    "an index of the device": (
        f"torch.ones(2)[{ROW}.to(device)]",
        "Refused",
        "indices should be either on cpu or",
        f"{ON}[{ROW}]",
    ),
    "values of the processor": (
        f"{ON}.index_put_(({ROW},), torch.ones(2))",
        "Refused",
        "expected values on pretend:0",
        f"{ON}.index_put_(({ROW},), torch.tensor(3.0))",
    ),
    "a generator of the processor": (
        f"torch.randn(2, device=device, generator={GENERATOR})",
        "Refused",
        "device type for generator",
        f"torch.randn(2, generator={GENERATOR}).to(device)",
    ),
    "a generator of the processor, in place": (
        f"{ON}.normal_(generator={GENERATOR})",
        "Refused",
        "device type for generator",
        f"{ON}.normal_()",
    ),
    "a generator given by place": (
        f"torch.multinomial({ON}, 1, False, generator={GENERATOR})",
        "Refused",
        "device type for generator",
        f"torch.multinomial({ON}, 1)",
    ),
    "numpy": (f"{ON}.numpy()", "TypeError", "can't convert pretend:0", f"{ON}.cpu().numpy()"),
    "numpy's own conversion": (
        f"__import__('numpy').asarray({ON})",
        "TypeError",
        "can't convert",
        f"__import__('numpy').asarray({ON}.cpu())",
    ),
    "the address": (f"{ON}.data_ptr()", "Refused", "cannot be read by its address", f"{ON}.cpu().data_ptr() > 0"),
    "the storage's address": (
        f"{ON}.untyped_storage().data_ptr()",
        "RuntimeError",
        "data pointer",
        f"{ON}.cpu().untyped_storage().data_ptr()",
    ),
    "a file without map_location": (
        f"devices.reread({ON})",
        "Refused",
        "read without map_location",
        f"devices.reread({ON}, map_location='cpu')",
    ),
}
"""What is refused, how, and its allowed neighbour."""

NEEDS_FLOAT64 = {
    "made there": "torch.zeros(2, dtype=torch.float64, device=device)",
    "moved there": "torch.zeros(2, dtype=torch.float64).to(device)",
    "converted": "torch.zeros(2, device=device).double()",
    "computed": "torch.zeros(2, device=device).sum(dtype=torch.float64)",
    "from numpy": "torch.as_tensor(__import__('numpy').zeros(2), device=device)",
    "a module": "torch.nn.Linear(2, 2).double().to(device)",
    "complex": "torch.zeros(2, dtype=torch.complex128, device=device)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, workers: Workers) -> None:
    refused, error, message, allowed = REFUSED[name]
    answer = workers["no_float64"].evaluate(refused)
    assert answer.error is not None, answer
    assert answer.error["type"] == error
    assert message in answer.error["message"]
    answer = workers["no_float64"].evaluate(allowed)
    assert answer.error is None, answer


@pytest.mark.parametrize("name", NEEDS_FLOAT64)
def test_float64_is_refused_where_there_is_none(name: str, workers: Workers) -> None:
    answer = workers["no_float64"].evaluate(NEEDS_FLOAT64[name])
    assert answer.error is not None, answer
    assert answer.error["type"] == "TypeError"
    assert "pretend:0 has no torch." in answer.error["message"]
    single = NEEDS_FLOAT64[name].replace("float64", "float32").replace("double", "float").replace("128", "64")
    single = single.replace("zeros(2)", "zeros(2, dtype='float32')") if "numpy" in single else single
    assert workers["no_float64"].evaluate(single).error is None
    number = "torch.ones(2, device=device) * torch.tensor(2.0, dtype=torch.float64)"  # its type does not matter
    assert "float64" not in str(workers["no_float64"].evaluate(number).value)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS_FLOAT64)
def test_float64_is_there_otherwise(name: str, workers: Workers) -> None:
    assert workers["float64"].evaluate(NEEDS_FLOAT64[name]).error is None


SAME_AS_ON_ANY_DEVICE = {
    "[*map(float, {x}.unbind())]": "[1.0, 2.0]",
    "{x}.tolist()": "[1.0, 2.0]",
    "format({x}[1], '.2f')": "'2.00'",
    "torch.tensor([{x}[0], {x}[1]])": "tensor([1., 2.])",
    "{x}.unsqueeze(0).squeeze_().shape": "torch.Size([2])",
    "{x}.max(0).indices.item()": "1",
    "{x}.to('cpu')": "tensor([1., 2.])",
    "__import__('copy').deepcopy({x}).cpu()": "tensor([1., 2.])",
    "{x}.view(2, 1).add_(1).flatten().cpu()": "tensor([2., 3.])",
    "torch.add({x}, 1, out=torch.empty(2, device={x}.device)).cpu()": "tensor([2., 3.])",
    "(torch.nn.Linear(2, 1).to({x}.device)({x}).backward(), 'gradients')[1]": "'gradients'",
}


@pytest.mark.parametrize("kind", ["cpu", "no_float64"])
@pytest.mark.parametrize("expression", SAME_AS_ON_ANY_DEVICE)
def test_what_works_everywhere(expression: str, kind: str, workers: Workers) -> None:
    answer = workers[kind].evaluate(expression.format(x="torch.tensor([1.0, 2.0], device=device)"))
    assert answer.error is None, answer
    assert answer.value == SAME_AS_ON_ANY_DEVICE[expression]


def test_results_lie_where_their_tensors_do(workers: Workers) -> None:
    for expression in (
        ON,
        f"{ON} + 1",
        f"{ON}.max(0).values",
        f"{ON}.new_zeros(2)",
        f"{ON} @ {ON}",
        f"{ON}.grad_fn or {ON}",
    ):
        assert workers["no_float64"].evaluate(f"({expression}).device").value == "device(type='pretend', index=0)"
    for expression in (f"{ON}.cpu()", f"torch.zeros_like({ON}, device='cpu')", "torch.ones(2)"):
        assert workers["no_float64"].evaluate(f"({expression}).device").value == "device(type='cpu')"


def test_a_weight_stays_the_same_object_when_its_module_moves(workers: Workers) -> None:
    for kind in ("cpu", "no_float64"):
        assert workers[kind].evaluate("devices.moved_in_place(device)").value == "(True, True, True)"


@pytest.mark.slow
def test_float64_on_the_device_is_counted(workers: Workers) -> None:
    assert workers["float64"].evaluate("devices.counted(device)").value == "(80, 80, 160, 0)"
