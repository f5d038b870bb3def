"""The optimizer against the singular value decomposition and against a problem with a known best step."""

import pytest
import torch

from muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(64, 576), (96, 64), (32, 32), (1, 7)])
def test_singular_vectors_stay_and_singular_values_become_about_one(shape):
    x = torch.randn(3, *shape) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    inside = u.mT @ orthogonalized(x).double() @ vh.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    large = s > 0.01 * s.norm(dim=-1, keepdim=True)
    assert values[large].min() > 0.65
    assert values.max() < 1.2
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-3


def test_a_zero_gradient_moves_nothing():
    assert not orthogonalized(torch.zeros(2, 4, 8)).any()


def test_the_first_step_is_the_nearest_orthogonal_matrix_in_the_size_of_adams():
    """One matrix with a gradient of singular values 1, where U V^T is the gradient itself."""
    gradient = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0].float()
    p = torch.nn.Parameter(torch.zeros(64, 16, 2, 2))
    p.grad = gradient.view(p.shape).clone()
    Muon([{"params": [p], "orthogonal": True}], lr=0.1, fused=True).step()
    direction = (-p.detach().flatten(1) * gradient).sum() / p.norm() / gradient.norm()
    assert direction > 0.999
    size = p.detach().square().mean().sqrt() / (0.2 * 0.1)  # Liu et al. 2025: Adam's steps are of 0.2 to 0.4 lr
    assert 0.65 < size < 1.2


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
