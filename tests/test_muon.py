"""The optimizer against the singular value decomposition and against a problem with a known best step."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_process import full_float32
from evaluation.features import full_precision
from training.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(64, 576), (96, 64), (32, 32), (1, 7)])
def test_singular_vectors_stay_and_singular_values_become_about_one(shape):
    x = torch.randn(3, *shape) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    inside = u.mT @ orthogonalized([x])[0].double() @ vh.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    large = s > 0.01 * s.norm(dim=-1, keepdim=True)
    assert values[large].min() > 0.65
    assert values.max() < 1.2
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-3


def test_a_zero_gradient_moves_nothing():
    assert not orthogonalized([torch.zeros(2, 4, 8)])[0].any()


@pytest.mark.parametrize(("named", "momentum"), [({}, 0.95), ({"momentum": 0.8}, 0.8)])
def test_three_steps_are_those_of_the_singular_value_decomposition(named, momentum):
    """Jordan et al. 2024 in float64: the average, Nesterov's step ahead, the quintic on the singular values; Liu's scale."""
    p = torch.nn.Parameter(torch.zeros(64, 9, 2, 2))
    expected, average = torch.zeros(64, 36, dtype=torch.float64), torch.zeros(64, 36, dtype=torch.float64)
    optimizer = Muon([{"params": [p], "orthogonal": True, **named}], lr=0.1, fused=True)
    for _ in range(3):
        gradient = torch.randn(64, 36)
        p.grad = gradient.view(p.shape).clone()
        optimizer.step()
        average = momentum * average + (1 - momentum) * gradient.double()
        ahead = momentum * average + (1 - momentum) * gradient.double()
        u, s, vh = torch.linalg.svd(ahead, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected -= 0.1 * 0.2 * 8 * u @ s.diag() @ vh
    assert (p.detach().view(64, 36) - expected).norm() < 1e-3 * expected.norm()


def test_an_ill_conditioned_quadratic_is_minimised_in_every_direction_at_once():
    """f(W) = tr(W^T H W) / 2, H's eigenvalues from 1e-4 to 1: plain gradient descent would need 1e4 steps."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16))[0]
    h = basis @ torch.diag(torch.logspace(-4, 0, 16)) @ basis.T
    p = torch.nn.Parameter(torch.linalg.qr(torch.randn(16, 16))[0].clone())
    optimizer = Muon([{"params": [p], "orthogonal": True}], lr=0.02, fused=True)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.zero_grad()
        (0.5 * (p.T @ h @ p).trace()).backward()
        optimizer.step()
    assert p.norm() < 0.05 * 4  # of the norm 4 that it began with


def test_other_groups_are_adams_own():
    torch.manual_seed(0)
    mine, adams = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    muon = Muon([{"params": [mine]}, {"params": [matrix], "orthogonal": True}], lr=0.1, fused=True)
    adam = torch.optim.Adam([adams], lr=0.1, fused=True)
    for _ in range(5):
        mine.grad = torch.randn(5, 3)
        adams.grad, matrix.grad = mine.grad.clone(), torch.randn(4, 4)
        muon.step(), adam.step()
    assert torch.equal(mine, adams)


def test_a_bad_step_changes_nothing():
    p, q = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    optimizer = Muon([{"params": [p], "orthogonal": True}, {"params": [q]}], lr=0.1, fused=True)
    for bad in (0.0, 1.0, 0.0):
        p.grad, q.grad = torch.full((4, 4), torch.nan if bad else 1.0), torch.ones(4)
        before, average = p.detach().clone(), optimizer.state[p].get("momentum", torch.zeros(())).clone()
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(bad)
        optimizer.step()
        assert torch.equal(before, p) == bool(bad)
        assert torch.equal(average, optimizer.state[p]["momentum"]) == bool(bad)
    assert optimizer.state[p]["step"] == optimizer.state[q]["step"] == 2


@pytest.mark.parametrize("fails", [False, True])
def test_its_products_are_in_full_float32_and_others_as_they_were(fails, monkeypatch):
    """An error in a product of the small matrices grows 12-fold a step."""
    seen = []

    def look(batches):
        seen.append(torch.get_float32_matmul_precision())
        if fails:
            raise RuntimeError
        return orthogonalized(batches)

    monkeypatch.setattr("training.muon.orthogonalized", look)
    before = torch.get_float32_matmul_precision()
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            Muon([{"params": [p], "orthogonal": True}], lr=0.1, fused=True).step()
        assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "medium")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def switches():
    """What products of float32 are set to, by the older switch and by those of torch 2.9; all are put back after the test."""
    places = (torch.backends, torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if not all(hasattr(place, "fp32_precision") for place in places):
        pytest.skip("this torch has the older switch alone")

    def read():
        try:
            older = torch.get_float32_matmul_precision()
        except RuntimeError:  # where the newer ones say what it cannot
            older = None
        return older, *(place.fp32_precision for place in places)

    def put(older, *newer):
        torch.set_float32_matmul_precision(older)
        for place, precision in zip(places, newer, strict=True):
            place.fp32_precision = precision

    before = read()
    put("highest", "none", "none", "none")  # as in a new process
    yield read
    put(before[0] or "highest", *before[1:])


def choose(older=None, everywhere=None, cuda=None, cpu=None):
    if older:
        torch.set_float32_matmul_precision(older)
    for place, precision in ((torch.backends, everywhere), (torch.backends.cuda, cuda), (torch.backends.mkldnn, cpu)):
        if precision:
            getattr(place, "matmul", place).fp32_precision = precision


CHOICES = [
    {"older": "highest"},
    {"older": "high"},
    {"older": "medium"},
    {"cuda": "tf32"},
    {"cpu": "bf16"},
    {"everywhere": "tf32"},
    {"older": "high", "cuda": "ieee"},
    {"older": "high", "cpu": "bf16"},
    {"older": "medium", "everywhere": "tf32", "cpu": "tf32"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_full_float32_is_that_whichever_switch_was_used_and_leaves_each_as_it_was(choice, switches):
    choose(**choice)
    before = switches()
    with full_float32():
        assert switches()[2:] == ("ieee", "ieee")
    assert switches() == before


def test_after_full_float32_what_is_set_for_all_products_still_holds_for_them(switches):
    choose(everywhere="tf32")
    with full_float32():
        pass
    choose(everywhere="ieee")
    assert switches()[1:] == ("ieee", "ieee", "ieee")


def test_it_steps_and_features_are_found_also_where_the_newer_switch_was_used(switches):
    choose(cuda="tf32")
    assert stepped([torch.zeros(4, 4)])[0].any()
    with full_precision():
        assert switches()[2] == "ieee"
    assert switches()[2] == "tf32"


class Calls(TorchDispatchMode):
    """Counts the operations that are called, without those that only look at a tensor in another way."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def stepped(weights, device="cpu"):
    weights = [torch.nn.Parameter(weight.to(device)) for weight in weights]
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer = Muon([{"params": weights, "orthogonal": True}], lr=0.1, fused=True)
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device=device)
    optimizer.step()
    return weights


def test_many_weights_of_one_shape_take_as_many_calls_as_one():
    shapes = [(8, 4, 3, 3), (8, 20), (30, 8)]
    counts = []
    for copies in (1, 5):
        weights = [torch.zeros(*shape) for shape in shapes * copies]
        weights = [w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
        with Calls() as calls:
            stepped(weights)
        counts.append([name for name in calls.names if not name.startswith(("aten.zeros", "aten.ones"))])  # state, gradients
    assert counts[0] == counts[1]
    assert sum("bmm" in name for name in counts[0]) == 2 * 3 + 1 + 4 * 4  # X X^T, factor X; five steps


@pytest.mark.usefixtures("fake_cuda")
def test_a_step_on_a_device_waits_for_nothing():
    """A fake tensor has no values: to read one, on the host, is an error."""
    with FakeTensorMode():
        assert stepped([torch.zeros(8, 20), torch.zeros(20, 8)], "cuda")[0].device.type == "cuda"
