"""The oracle: matrices written out from the papers, in float64, and sums over every state of two pixels."""

import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import discrete_diffusion
from beta_schedule import BetaSchedule, CosineSchedule, LinearSchedule
from dataset import Digits
from discrete_diffusion import DiscreteDiffusion, to_symbols, to_values
from gaussian_diffusion import GaussianDiffusion

TRANSITIONS = ("uniform", "absorbing", "gaussian", "binomial")
BETA = torch.tensor([0.15, 0.3, 0.25, 0.6], dtype=torch.float64)
T = len(BETA)
PIXELS = 2


def levels_of(transition):
    return 2 if transition == "binomial" else 3


# The oracle


def step_matrix(transition, n_levels, beta):
    """Q_t of Austin et al. 2021, appendix A.2, and of Sohl-Dickstein et al. 2015, appendix B, entry by entry."""
    beta, k = float(beta), n_levels
    if transition == "binomial":  # x_t is 1 with probability x_{t-1} (1 - beta) + beta / 2
        ones = [x * (1 - beta) + 0.5 * beta for x in (0, 1)]
        return torch.tensor([[1 - one, one] for one in ones], dtype=torch.float64)
    matrix = torch.zeros(k, k, dtype=torch.float64)
    if transition == "absorbing":
        matrix = torch.zeros(k + 1, k + 1, dtype=torch.float64)
        matrix[:, k] = beta
        matrix += (1 - beta) * torch.eye(k + 1)
    for i, j in itertools.product(range(k), range(k)):
        if transition == "uniform":
            matrix[i, j] = 1 - (k - 1) / k * beta if i == j else beta / k
        if transition == "gaussian" and i != j:
            everywhere = sum(math.exp(-4 * n**2 / ((k - 1) ** 2 * beta)) for n in range(-(k - 1), k))
            matrix[i, j] = math.exp(-4 * abs(i - j) ** 2 / ((k - 1) ** 2 * beta)) / everywhere
    if transition == "gaussian":
        for i in range(k):
            matrix[i, i] = 1 - matrix[i].sum()
    return matrix


class Chain:
    """Everything about one symbol by matrix products, everything about pixels by sums over their states."""

    def __init__(self, transition, n_levels, beta):
        self.K, self.T = n_levels, len(beta)
        self.Q = [None] + [step_matrix(transition, n_levels, b) for b in beta]
        self.S = len(self.Q[1])
        self.Q_bar = [torch.eye(self.S, dtype=torch.float64)]
        for t in range(1, self.T + 1):
            self.Q_bar.append(self.Q_bar[-1] @ self.Q[t])
        self.prior = self.Q_bar[-1][: self.K].mean(0)  # of x_0 that may be any level

    def between(self, s, t):
        product = torch.eye(self.S, dtype=torch.float64)
        for time in range(s + 1, t + 1):
            product = product @ self.Q[time]
        return product

    def posterior(self, x0, xt, t):
        """q(x_{t-1} | x_0, x_t) by Bayes' rule, [S]."""
        joint = self.Q_bar[t - 1][x0] * self.Q[t][:, xt]
        return joint / joint.sum()

    def reverse(self, p, xt, t, s=None):
        """p(x_s | x_t), s = t - 1 by default, from p_hat(x_0 | x_t) [K]: Austin et al., equation 4, summed over x_0; [S]."""
        s = t - 1 if s is None else s
        step, joint = self.between(s, t), torch.zeros(self.S, dtype=torch.float64)
        for x0 in range(self.K):
            joint = joint + p[x0] * self.Q_bar[s][x0] * step[:, xt]
        return joint / joint.sum()

    def term(self, x0, xt, t, p):
        """The bound's term at t of one symbol."""
        q, reverse = self.posterior(x0, xt, t), self.reverse(p, xt, t)
        if t == 1:
            return -reverse[x0].log()
        return sum(q[y] * (q[y] / reverse[y]).log() for y in range(self.S) if q[y] > 0)


class Table(nn.Module):
    """A network that knows the logits of every x_t of so many pixels, at every t."""

    def __init__(self, n_levels, n_states, timesteps=T, pixels=PIXELS, seed=0, spread=1.5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (timesteps + 1, *[n_states] * pixels, pixels, n_levels)
        self.logits = nn.Parameter(spread * torch.randn(shape, generator=generator))

    def forward(self, xt, t):
        return self.logits[(t, *xt.unbind(1))]


class Optimal(nn.Module):
    """log p(x_0^i | all of x_t but x_t^i) of two pixels with the joint distribution [K, K]: what no training can beat."""

    def __init__(self, joint, chain):
        super().__init__()
        K = chain.K
        jump = torch.stack(chain.Q_bar)[:, :K]  # [T + 1, K, S]
        first = torch.einsum("ab,tby->tya", joint, jump)  # of pixel 0, given x_t of pixel 1
        second = torch.einsum("ab,tax->txb", joint, jump)
        self.first, self.second = ((p / p.sum(2, keepdim=True)).log().float() for p in (first, second))

    def forward(self, xt, t):
        return torch.stack([self.first[t, xt[:, 1]], self.second[t, xt[:, 0]]], dim=1)


def build(transition, n_levels=None, beta=BETA, loss_mode="bound", net=None, **more):
    n_levels = n_levels or levels_of(transition)
    chain = Chain(transition, n_levels, beta)
    net = Table(n_levels, chain.S, len(beta)) if net is None else net(chain)
    return DiscreteDiffusion(BetaSchedule(beta), net, n_levels, transition, loss_mode, **more), chain


def states(count, pixels=PIXELS):
    """Every state of the pixels, [count^pixels, pixels]."""
    return torch.tensor(list(itertools.product(range(count), repeat=pixels)))


def assert_frequencies(found, expected, count):
    """The frequencies of independent draws are the expected ones, within five standard errors."""
    error = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 5 * error + 1e-12).all(), (found - expected) / error


def assert_mean(values, expected):
    values = values.double().detach()
    standard_error = values.std().item() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(float(expected), abs=5 * standard_error + 1e-6)


# Forward process and posterior


@pytest.mark.parametrize(
    ("transition", "n_levels"), [("binomial", 2), *itertools.product(("uniform", "absorbing", "gaussian"), (2, 3, 4, 7))]
)
def test_kernels_are_the_papers_matrices(transition, n_levels):
    diffusion, chain = build(transition, n_levels, net=lambda chain: nn.Identity())
    every_state = torch.arange(chain.S).expand(T, -1)
    t = torch.arange(1, T + 1)
    transitions = diffusion.transitions
    for kernel, expected in ((transitions.step(t), chain.Q[1:]), (transitions.jump(t), chain.Q_bar[1:])):
        expected = torch.stack(expected)
        torch.testing.assert_close(kernel.log_from(every_state).exp().double(), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(kernel.log_into(every_state).exp().double(), expected.mT, atol=1e-6, rtol=1e-5)
    for s, t in itertools.combinations(range(T + 1), 2):
        matrix = transitions.between(s, t).log_from(every_state[:1]).exp().double()[0]
        torch.testing.assert_close(matrix, chain.between(s, t), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n_levels", [20, 21])
@pytest.mark.parametrize("table_bytes", [2**25, 4000, 1])
def test_gaussian_products_that_are_not_kept_are_made(monkeypatch, table_bytes, n_levels):
    monkeypatch.setattr(discrete_diffusion, "TABLE_BYTES", table_bytes)
    beta = LinearSchedule(12, 1e-3, 0.05).beta
    diffusion, chain = build("gaussian", n_levels, beta, net=lambda chain: nn.Identity())
    assert (len(diffusion.transitions.products) < 13) == (table_bytes < 2**25)
    x = torch.arange(n_levels).expand(12, -1)
    found = diffusion.transitions.jump(torch.arange(1, 13)).log_from(x).exp().double()
    torch.testing.assert_close(found, torch.stack(chain.Q_bar[1:]), atol=1e-30, rtol=1e-4)  # the least of them too


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_draws_of_q_have_its_frequencies(transition):
    diffusion, chain = build(transition)
    count = 10000
    u = (torch.arange(count)[:, None] + 0.5) / count  # so that each frequency is right to 1 / count and no luck is needed
    for t in range(1, T + 1):
        for draw, matrix, sources in ((diffusion.q_step, chain.Q[t], chain.S), (diffusion.q_sample, chain.Q_bar[t], chain.K)):
            for x in range(sources):
                drawn = draw(torch.full((count, 1), x), t, u)
                found = drawn[:, 0].bincount(minlength=chain.S) / count
                torch.testing.assert_close(found.double(), matrix[x], atol=2.5 / count, rtol=0)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_posterior_is_bayes_rule(transition):
    diffusion, chain = build(transition)
    for t, x0, xt in itertools.product(range(1, T + 1), range(chain.K), range(chain.S)):
        if chain.Q_bar[t][x0, xt] > 0:
            found = diffusion.q_posterior(torch.tensor([[x0]]), torch.tensor([[xt]]), t)[0, 0]
            torch.testing.assert_close(found.double(), chain.posterior(x0, xt, t), atol=1e-6, rtol=1e-5)


def test_binomial_is_the_uniform_transition_at_the_same_beta():
    """A step forgets the symbol with probability beta, and so turns it over with beta / 2."""
    u = torch.rand(5000, 1, generator=torch.Generator().manual_seed(0))
    x0 = (torch.arange(5000) % 2)[:, None]
    binomial, uniform = (build(name, 2)[0] for name in ("binomial", "uniform"))
    assert torch.equal(binomial.q_sample(x0, 3, u), uniform.q_sample(x0, 3, u))
    turned = step_matrix("uniform", 2, 0.3)[0, 1]
    assert turned == step_matrix("binomial", 2, 0.3)[0, 1] == pytest.approx(0.15)


def test_the_gaussian_posterior_approaches_equation_4():
    """The walk has variance beta_t / 2 a step and no drift: equation 4's process, seen in x_t / sqrt(alpha_bar_t)."""
    beta = torch.tensor([0.02, 0.03, 0.04], dtype=torch.float64)
    alpha_bar = 1 / (1 + beta.cumsum(0) / 2)
    normal = GaussianDiffusion(SimpleNamespace(alpha_bar=alpha_bar), nn.Identity())
    x0, x3 = -0.25, 0.25
    mean, variance = normal.q_posterior(torch.tensor([[x0]]), torch.tensor([[x3 * alpha_bar[2].sqrt()]]).float(), 3)
    mean, variance = (mean / alpha_bar[1].sqrt()).item(), (variance / alpha_bar[1]).item()
    errors = []
    for n_levels in (9, 17, 33, 65):
        diffusion, _ = build("gaussian", n_levels, beta, net=lambda chain: nn.Identity())
        symbols = [to_symbols(torch.tensor([[x]]), n_levels) for x in (x0, x3)]
        p = diffusion.q_posterior(*symbols, 3)[0, 0].double()
        values = to_values(torch.arange(n_levels), n_levels).double()
        found = (p * values).sum().item()
        errors.append(max(abs(found - mean), abs((p * values**2).sum().item() - found**2 - variance)))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[-1] < 1e-5


# Reverse process, bound, losses


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_reverse_probabilities_are_equation_4_of_austin(transition):
    diffusion, chain = build(transition)
    xt = states(chain.S)
    for t in range(1, T + 1):
        p = diffusion.predict(xt, t).exp().double()
        found = diffusion.p_probabilities(xt, t)
        expected = [[chain.reverse(p[b, i], xt[b, i], t) for i in range(PIXELS)] for b in range(len(xt))]
        expected = torch.stack([torch.stack(row) for row in expected])
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_loss_and_its_gradient_are_the_sums_over_states(transition):
    diffusion, chain = build(transition)
    generator = torch.Generator().manual_seed(1)
    x0 = states(chain.K).repeat(12, 1)
    for t in range(1, T + 1):
        noise = torch.rand(x0.shape, generator=generator)
        xt = diffusion.q_sample(x0, t, noise)
        loss = diffusion.loss(x0, t, noise)
        (gradient,) = torch.autograd.grad(loss.sum(), diffusion.time_aware_net.logits)
        logits = diffusion.time_aware_net.logits.detach().double().requires_grad_()
        p = logits[(torch.full((len(x0),), t), *xt.unbind(1))].softmax(-1)
        terms = [[chain.term(x0[b, i], xt[b, i], t, p[b, i]) for i in range(PIXELS)] for b in range(len(x0))]
        expected = torch.stack([sum(row) / PIXELS for row in terms])
        (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
        torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-5, rtol=1e-4)


def exact_bound(chain, net, x0):
    """Prior, KL and reconstruction of one x_0 [PIXELS] by sums over every x_t, nats per dimension."""
    q_T = [chain.Q_bar[-1][x] for x in x0]
    prior = sum((q[y] * (q[y] / chain.prior[y]).log()) for q in q_T for y in range(chain.S) if q[y] > 0) / PIXELS
    kl = {t: 0.0 for t in range(1, chain.T + 1)}
    for t, xt in itertools.product(kl, states(chain.S)):
        weight = math.prod(chain.Q_bar[t][x0[i], xt[i]].item() for i in range(PIXELS))
        if weight > 0:
            p = net(xt[None], torch.tensor([t]))[0].double().softmax(-1).detach()
            kl[t] += weight * sum(chain.term(x0[i], xt[i], t, p[i]) for i in range(PIXELS)).item() / PIXELS
    return float(prior), sum(kl[t] for t in kl if t > 1), kl[1]


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_the_parts_of_the_bound_are_exact(transition):
    diffusion, chain = build(transition)
    x0 = torch.tensor([1, 0])
    prior, kl, reconstruction = exact_bound(chain, diffusion.time_aware_net, x0)
    bound = diffusion.variational_bound(x0.expand(8000, -1), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bound.prior.double(), torch.full((8000,), prior).double(), atol=1e-6, rtol=1e-5)
    for found, expected in ((bound.kl, kl), (bound.reconstruction, reconstruction), (bound.total, prior + kl + reconstruction)):
        assert_mean(found, expected)
    rough = [diffusion.variational_bound(x0.expand(40, -1), timesteps=2).kl.mean() for _ in range(400)]
    assert_mean(torch.stack(rough), kl)


def test_each_sample_of_a_quick_bound_has_a_time_of_its_own():
    """A network that knows nothing pays log 3 for the share of masked symbols that a step unmasks, which tells the time."""
    diffusion, _ = build("absorbing", net=lambda chain: Table(3, 4, spread=0, pixels=1))
    kl = diffusion.variational_bound(torch.zeros(4000, 1, dtype=torch.long), timesteps=1).kl.double()
    alpha_bar = torch.cat([torch.ones(1).double(), (1 - BETA).cumprod(0)])
    unmasks = (alpha_bar[1:-1] - alpha_bar[2:]) / (1 - alpha_bar[2:])  # t = 2..T
    terms = torch.cat([torch.zeros(1).double(), (T - 1) * unmasks * math.log(3)])  # nothing where no symbol is masked
    which = (kl[:, None] - terms).abs().argmin(1)
    torch.testing.assert_close(kl, terms[which], rtol=1e-5, atol=1e-6)
    masked = (1 - alpha_bar[2:]) / (T - 1)  # that time, and the symbol masked then
    assert_frequencies(which.bincount(minlength=T) / 4000, torch.cat([1 - masked.sum()[None], masked]), 4000)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_forward_estimates_the_bound_without_its_prior(transition):
    diffusion, chain = build(transition)
    x0 = torch.tensor([1, 0])
    _, kl, reconstruction = exact_bound(chain, diffusion.time_aware_net, x0)
    torch.manual_seed(0)
    values = torch.stack([diffusion(x0.expand(16, -1)) for _ in range(600)])
    assert_mean(values, kl + reconstruction)


def test_the_absorbing_bound_is_the_weighted_masked_prediction_loss():
    """Shi et al. 2024 (arXiv:2406.04329): of the masked symbols alone, weighted by the share that a step unmasks."""
    diffusion, _ = build("absorbing")
    generator = torch.Generator().manual_seed(0)
    x0 = states(3).repeat(20, 1)
    alpha_bar = torch.cat([torch.ones(1).double(), (1 - BETA).cumprod(0)])
    for t in range(1, T + 1):
        noise = torch.rand(x0.shape, generator=generator)
        xt = diffusion.q_sample(x0, t, noise)
        cross_entropy = (
            -diffusion.time_aware_net(xt, torch.full((len(x0),), t)).log_softmax(-1).gather(2, x0[..., None])[..., 0]
        )
        weight = ((alpha_bar[t - 1] - alpha_bar[t]) / (1 - alpha_bar[t])).item()
        expected = weight * (cross_entropy * (xt == 3)).mean(1)
        torch.testing.assert_close(diffusion.loss(x0, t, noise), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_a_sample_may_be_one_symbol(transition):
    """x [B] has the losses and the probabilities of the same symbols as [B, 1, 1]; a batch may be empty."""
    K = levels_of(transition)
    logits = torch.randn(len(BETA) + 1, K + 1, K)

    class OfOneSymbol(nn.Module):
        def forward(self, xt, t):
            return logits[t.view(-1, *[1] * (xt.ndim - 1)), xt]

    diffusion = build(transition, net=lambda chain: OfOneSymbol())[0]
    x0, t, noise = torch.arange(12) % K, torch.arange(12) % T + 1, torch.rand(12)
    more = (12, 1, 1)
    assert torch.equal(diffusion.loss(x0, t, noise), diffusion.loss(x0.view(more), t, noise.view(more)))
    xt = diffusion.q_sample(x0, t, noise)
    assert torch.equal(diffusion.p_probabilities(xt, t), diffusion.p_probabilities(xt.view(more), t)[:, 0, 0])
    assert diffusion.variational_bound(x0).total.shape == (12,)
    assert diffusion.loss(x0[:0].view(0, 3), 2).shape == (0,)


class Dropping(nn.Module):
    """Learned logits of 4 levels, half of them dropped."""

    def __init__(self):
        super().__init__()
        self.logits, self.dropout = nn.Parameter(torch.randn(5, 4)), nn.Dropout(0.5)

    def forward(self, xt, t):
        return self.dropout(self.logits[xt])


def test_the_terms_that_forward_leaves_have_its_mean_and_no_gradient():
    diffusion, _ = build("uniform", 4, net=lambda chain: Dropping())
    loss = diffusion(torch.randint(0, 4, (6, 5)))
    t, terms = diffusion.last_terms
    assert t.shape == (6,)
    assert not terms.requires_grad
    torch.testing.assert_close(terms.mean(), loss.detach())


def test_the_generator_decides_the_times_of_a_quick_bound_and_dropout_is_off_in_it():
    diffusion, _ = build("uniform", 4, net=lambda chain: Dropping())
    x0 = torch.randint(0, 4, (6, 5))
    one, other = (
        diffusion.variational_bound(x0, timesteps=2, generator=torch.Generator().manual_seed(1)).total for _ in range(2)
    )
    assert torch.equal(one, other)
    assert diffusion.training
    assert diffusion.time_aware_net.dropout.training


def test_the_noise_is_of_float64():
    assert discrete_diffusion._noise(torch.zeros(2, 3, dtype=torch.long), None).dtype == torch.float64


@pytest.mark.parametrize("found", ["of the batch", "a pixel"])
def test_a_loss_of_ones_own_that_is_not_one_a_sample_is_named(found):
    class Own(DiscreteDiffusion):
        def loss(self, x0, t, noise=None, condition=None):
            loss = super().loss(x0, t, noise, condition)
            return loss.mean() if found == "of the batch" else loss[:, None].expand(x0.shape)

    with pytest.raises(ValueError, match=r"^loss: gives \[.*\] for 6 samples: must give one value a sample, \[6\]$"):
        Own(BetaSchedule(BETA), Dropping(), 4)(torch.zeros(6, 5, dtype=torch.long))


def test_products_are_taken_also_where_the_newer_switch_was_used():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the older switch alone")
    diffusion, _ = build("gaussian", 4, net=lambda chain: Dropping())
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        assert diffusion.loss(torch.zeros(2, 5, dtype=torch.long), 3).isfinite().all()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_hybrid_adds_the_cross_entropy():
    diffusion, _ = build("uniform", loss_mode="hybrid", cross_entropy_weight=0.3)
    plain, _ = build("uniform")
    x0 = states(3)
    noise = torch.rand(x0.shape, generator=torch.Generator().manual_seed(0))
    xt = plain.q_sample(x0, 2, noise)
    target = torch.nn.functional.one_hot(x0, 3)
    logits = plain.time_aware_net(xt, torch.full((9,), 2))
    cross_entropy = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target.transpose(1, 2).float(), reduction="none")
    expected = plain.loss(x0, 2, noise) + 0.3 * cross_entropy.mean(1)
    torch.testing.assert_close(diffusion.loss(x0, 2, noise), expected)


def falling_to(transition, timesteps):
    """A schedule of so many steps whose end knows almost nothing of x_0, with steps that shrink as they become more."""
    if transition == "gaussian":  # of three levels, a step leaves a level with a probability near exp(-1 / beta)
        return torch.full((timesteps,), 1 / math.log(timesteps / 6), dtype=torch.float64)
    return CosineSchedule(timesteps).beta


@torch.no_grad()
def expected_bound(diffusion, chain, joint):
    """The bound of two pixels with the joint distribution [K, K], nats per dimension: every x_0 and x_t by its probability."""
    x0, xt = states(chain.K), states(chain.S)
    pairs = [x.flatten(0, 1) for x in (x0[:, None].expand(-1, len(xt), -1), xt[None].expand(len(x0), -1, -1))]
    t = torch.arange(1, chain.T + 1).repeat_interleave(len(pairs[0]))
    x0s, xts = (x.repeat(chain.T, 1) for x in pairs)
    jump = torch.stack(chain.Q_bar)
    weight = joint[tuple(x0s.T)] * jump[t, x0s[:, 0], xts[:, 0]] * jump[t, x0s[:, 1], xts[:, 1]]
    there = weight > 0
    t, x0s, xts, weight = (x[there] for x in (t, x0s, xts, weight))
    kl = diffusion._kl(x0s, xts, t, diffusion.predict(xts, t)).mean(1).double()
    return (weight * kl).sum() + (joint.flatten() * diffusion.variational_bound(x0).prior).sum()


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_the_optimal_networks_bound_approaches_the_entropy(transition):
    n_levels = levels_of(transition)
    joint = torch.rand(n_levels, n_levels, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    joint /= joint.sum()
    entropy = -(joint * joint.log()).sum() / PIXELS
    gaps = []
    for timesteps in (32, 128, 512):
        diffusion, chain = build(
            transition, n_levels, falling_to(transition, timesteps), net=lambda chain: Optimal(joint, chain)
        )
        gaps.append((expected_bound(diffusion, chain, joint) - entropy).item())
    assert 0 < gaps[2] < 0.5 * gaps[1] < 0.25 * gaps[0]
    assert gaps[2] < 0.005 * entropy


def test_a_small_chance_to_move_keeps_its_digits():
    diffusion, _ = build("uniform", 4, torch.full((3,), 1e-6, dtype=torch.float64), net=lambda chain: nn.Identity())
    torch.testing.assert_close(diffusion.transitions.step_move[1:], torch.full((3,), 1e-6), rtol=1e-5, atol=0)


def test_one_step_between_two_times_is_that_step_also_where_float32_holds_no_such_probability():
    transitions = DiscreteDiffusion(LinearSchedule(8), nn.Identity(), 256, "gaussian").transitions
    x = torch.arange(256)[None]
    assert torch.equal(transitions.between(1, 2).log_from(x), transitions.step(torch.tensor([2])).log_from(x))


def test_of_a_sum_too_small_for_float32_the_term_of_what_stays_is_left():
    """From level 0, which is all but certain, at most level 1 is reached; the others are at e^-300, where they were."""
    kernel = DiscreteDiffusion(LinearSchedule(8), nn.Identity(), 8, "gaussian").transitions.jump(torch.tensor([2]))
    found = kernel.log_push(torch.tensor([[[0.0] + [-300.0] * 7]]))[0, 0]
    torch.testing.assert_close(found[2:], torch.full((6,), -300.0))


def test_a_draw_is_of_no_impossible_state_and_of_any_other():
    def drawn(log_p, u):
        return discrete_diffusion._categorical(torch.tensor(log_p), torch.tensor(u, dtype=torch.float64)).item()

    assert drawn([0.0, -math.inf], 1 - 1e-12) == 0
    assert drawn([-math.inf, 0.0], 0.0) == 1
    assert drawn([0.0, -23.0], 1 - 5e-11) == 1  # its probability, 1e-10, is none beside 1 in float32


def test_small_steps_lose_no_digits():
    """A thousand terms of about 1e-4: each is right to float32's rounding, and the errors do not add up."""
    for transition in ("uniform", "absorbing", "gaussian"):
        beta = (CosineSchedule(1000) if transition != "gaussian" else LinearSchedule(1000, 0.02, 0.2)).beta
        diffusion, chain = build(transition, 4, beta, net=lambda chain: Table(4, chain.S, 1000, pixels=1))
        times = torch.arange(1, 1001, 7)
        x0 = torch.ones(len(times), 1, dtype=torch.long)
        noise = torch.rand(x0.shape, generator=torch.Generator().manual_seed(0))
        xt = diffusion.q_sample(x0, times, noise)
        p = diffusion.predict(xt, times).exp().double()
        expected = torch.stack([chain.term(1, xt[i, 0], t, p[i, 0]) for i, t in enumerate(times.tolist())])
        error = diffusion.loss(x0, times, noise).double() - expected
        assert error.abs().max() < 2e-6
        assert error.mean().abs() < 2e-7


# Samples


@pytest.mark.parametrize("timesteps", [None, [4, 2], 2])
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_samples_have_the_chains_distribution(transition, timesteps):
    diffusion, chain = build(transition)
    x = states(chain.S)
    p = torch.stack([chain.prior[xs].prod() for xs in x])
    times = {None: [4, 3, 2, 1], 2: [4, 1]}.get(timesteps if not isinstance(timesteps, list) else "", timesteps)
    for t, s in itertools.pairwise([*times, 0]):
        predicted = diffusion.predict(x, t).exp().double()
        step = []
        for b in range(len(x)):
            one, other = (chain.reverse(predicted[b, i], x[b, i], t, s) for i in range(PIXELS))
            step.append(torch.outer(one, other).flatten())
        p = p @ torch.stack(step)
    count = 40000
    samples = diffusion.sample((count, PIXELS), timesteps=timesteps, generator=torch.Generator().manual_seed(0))
    assert samples.max() < chain.K
    index = samples[:, 0] * chain.S + samples[:, 1]
    assert_frequencies(index.bincount(minlength=chain.S**PIXELS) / count, p.detach(), count)


def test_steps_are_even_in_time_and_as_many_as_the_networks_calls():
    diffusion, _ = build("uniform", 4, CosineSchedule(100).beta, net=lambda chain: nn.Identity())
    assert diffusion.steps(4) == [100, 67, 34, 1]
    assert diffusion.network_calls(4) == 4


def test_p_sample_draws_the_reverse_probabilities():
    diffusion, _ = build("gaussian")
    count = 10000
    u = ((torch.arange(count)[:, None] + 0.5) / count).expand(-1, PIXELS)
    xt = torch.tensor([2, 0])
    drawn = diffusion.p_sample(xt.expand(count, -1), 3, u)
    p = diffusion.p_probabilities(xt[None], 3)[0]
    for i in range(PIXELS):
        torch.testing.assert_close(drawn[:, i].bincount(minlength=3) / count, p[i], atol=2.5 / count, rtol=0)


def test_a_trajectory_ends_in_its_sample_and_repeats_with_its_seed():
    diffusion, _ = build("absorbing")
    generator = torch.Generator().manual_seed(5)
    found = list(diffusion.trajectory((6, PIXELS), generator=generator))
    assert [t for t, _ in found] == [4, 3, 2, 1, 0]
    again = diffusion.sample((6, PIXELS), generator=torch.Generator().manual_seed(5))
    assert torch.equal(found[-1][1], again)
    masked = [(x == 3).float().mean().item() for _, x in found]
    assert masked[-1] == 0
    assert masked == sorted(masked, reverse=True)  # what is unmasked stays so


def test_a_condition_reaches_the_network_row_by_row():
    class Labelled(nn.Module):
        def forward(self, xt, t, label):
            assert label.shape == t.shape
            return 20.0 * torch.nn.functional.one_hot(label, 3)[:, None].expand(*xt.shape, 3).float()

    diffusion, _ = build("uniform", net=lambda chain: Labelled())
    label = torch.tensor([0, 1, 2, 1])
    condition = {"label": label}
    x0 = label[:, None].expand(-1, PIXELS)
    assert torch.equal(diffusion.sample((4, PIXELS), condition=condition), x0)
    right = diffusion.variational_bound(x0, condition=condition).total
    wrong = diffusion.variational_bound((x0 + 1) % 3, condition=condition).total
    assert (right < 0.5).all()
    assert (wrong > 5).all()
    assert diffusion(x0, condition=condition) < diffusion((x0 + 1) % 3, condition=condition)
    assert torch.equal(diffusion.p_sample(x0, 1, condition=condition), x0)


# Numbers at the edge


@pytest.mark.parametrize("transition", ["uniform", "absorbing", "gaussian"])
def test_a_network_that_is_sure_and_wrong_costs_much_but_is_finite(transition):
    beta = LinearSchedule(20, 1e-4, 0.02).beta if transition == "gaussian" else LinearSchedule(20, 0.01, 0.5).beta

    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([500.0] + [0.0] * 255))

        def forward(self, xt, t):
            return self.logits.expand(*xt.shape, 256)

    diffusion = DiscreteDiffusion(BetaSchedule(beta), Sure(), 256, transition)
    x0 = torch.full((20, 3), 255)
    loss = diffusion.loss(x0, torch.arange(1, 21))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert diffusion.time_aware_net.logits.grad.isfinite().all()
    if transition != "absorbing":  # of which a masked symbol is what the network says it is
        with torch.no_grad():
            diffusion.time_aware_net.logits[1:] = -math.inf
        assert diffusion.loss(x0[1:], torch.arange(2, 21)).isfinite().all()
    assert diffusion.variational_bound(x0[:2]).total.min() > 10
    assert ((diffusion.sample((2, 3)) >= 0) & (diffusion.sample((2, 3)) < 256)).all()


@functools.cache  # whose matrices take a second
def of_256_levels() -> DiscreteDiffusion:
    return DiscreteDiffusion(LinearSchedule(1000), None, 256, "gaussian")


@pytest.mark.parametrize(("t", "off"), [(2, 5), (2, 13), (2, 16), (2, 20), (3, 16), (5, 16), (5, 20), (10, 30)])
def test_near_x_t_the_loss_is_exact_also_where_the_network_is_sure_of_another_level(t, off):
    """Of 256 levels, by equations 26 to 29 in float64. At t = 2 and 20 levels off, log p_hat(x_0) is -168."""
    n_levels, schedule, level, log_scale = 256, LinearSchedule(1000), 100, -5.0
    distance = torch.arange(n_levels, dtype=torch.float64)[:, None] - torch.arange(n_levels)
    jump, step = torch.eye(n_levels, dtype=torch.float64), None
    for beta in schedule.beta[:t].tolist():
        jump = jump if step is None else jump @ step
        everywhere = np.exp(-4 * np.arange(-255, 256) ** 2 / (255**2 * beta)).sum()
        step = torch.exp(-4 * distance**2 / (255**2 * beta)) / everywhere
        step.fill_diagonal_(0)
        step += torch.diag(1 - step.sum(1))
    values = torch.linspace(-1, 1, n_levels, dtype=torch.float64)
    location = values[level + off].clone().requires_grad_()
    edge, inverse = 1 / (n_levels - 1), math.exp(2 - log_scale)  # Austin et al. 2021, appendix A.8
    ends = [(values - location + sign * edge) * inverse for sign in (1, -1)]
    log_p = torch.log_softmax(nn.functional.logsigmoid(ends[0]) + nn.functional.logsigmoid(-ends[1]), 0)
    log_q = torch.log_softmax(jump[level].log() + step[:, level].log(), 0)
    log_model = torch.log_softmax(torch.logsumexp(log_p[:, None] + jump.log(), 0) + step[:, level].log(), 0)
    expected = torch.where(log_q > -math.inf, log_q.exp() * (log_q - log_model), 0).sum()

    diffusion = of_256_levels()
    diffusion.time_aware_net = lambda xt, t: log_p.detach().float().expand(1, 1, -1)
    logits, at = log_p.detach().float().requires_grad_(), torch.tensor([[level]])
    found = diffusion._kl(at, at, torch.tensor([t]), logits[None, None].log_softmax(-1)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    torch.testing.assert_close(diffusion.p_probabilities(at, t)[0, 0].double(), log_model.exp(), rtol=0, atol=1e-4)
    (by_logits,) = torch.autograd.grad(found, logits)
    slopes = [
        torch.autograd.grad(each, location, retain_graph=True)[0].item() for each in (expected, (log_p * by_logits).sum())
    ]
    assert slopes[1] == pytest.approx(slopes[0], rel=0.05)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_autocast_changes_nothing_but_the_network(transition):
    diffusion, _ = build(transition)
    x0 = states(levels_of(transition))
    noise = torch.rand(x0.shape, generator=torch.Generator().manual_seed(0))
    plain = diffusion.loss(x0, 3, noise)
    with torch.autocast("cpu", torch.bfloat16):
        low = diffusion.loss(x0, 3, noise)
    assert low.dtype == torch.float32
    assert torch.equal(plain, low)


@pytest.mark.parametrize("transition", ["uniform", "absorbing", "gaussian"])
def test_256_levels_at_1000_steps_take_under_100_megabytes_copied_for_the_average_too(transition):
    diffusion = DiscreteDiffusion(LinearSchedule(1000), nn.Identity(), 256, transition)
    tables = [*diffusion.buffers(), *(v for m in diffusion.modules() for v in vars(m).values() if isinstance(v, torch.Tensor))]
    assert 2 * sum(table.nbytes for table in tables) < 100e6
    assert not diffusion.state_dict()


def test_a_schedule_may_end_with_nothing_left():
    """alpha_bar_T = 0: with 1 / (T - t + 1), the schedule of Sohl-Dickstein et al. for the mask."""
    alpha_bar = 1 - torch.arange(1, 5, dtype=torch.float64) / 4
    diffusion = DiscreteDiffusion(SimpleNamespace(alpha_bar=alpha_bar), Table(3, 4), 3, "absorbing")
    assert diffusion.log_prior.exp().tolist() == [0, 0, 0, 1]
    bound = diffusion.variational_bound(states(3))
    assert (bound.prior == 0).all()
    assert bound.total.isfinite().all()
    assert (diffusion.q_sample(states(3), 4) == 3).all()


# Symbols and values


def test_symbols_of_the_digits_are_scikit_learns_grey_levels():
    from sklearn.datasets import load_digits

    images = Digits(train=False)
    found = to_symbols(torch.stack([images[i] for i in range(len(images))]), 17)
    assert torch.equal(found[:, 0], torch.tensor(load_digits().images[::10]).long())


@pytest.mark.parametrize("n_levels", [2, 17, 256])
def test_symbols_and_values_are_inverse(n_levels):
    symbols = torch.arange(n_levels)
    values = to_values(symbols, n_levels)
    torch.testing.assert_close(values, torch.linspace(-1, 1, n_levels))
    assert torch.equal(to_symbols(values, n_levels), symbols)
    assert to_values(torch.tensor([n_levels]), n_levels) == 0
    assert to_symbols(torch.tensor([-2.0, 2.0]), n_levels).tolist() == [0, n_levels - 1]  # beyond the ends
    bytes_ = torch.arange(256) / 127.5 - 1
    assert torch.equal(to_symbols(bytes_, 256), torch.arange(256))
    assert torch.equal(to_symbols(bytes_, 2), (torch.arange(256) >= 128).long())


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"n_levels": 1}, r"n_levels = 1: must be a whole number in 2\.\.65536"),
        ({"n_levels": 2**16 + 1}, r"n_levels = 65537"),
        ({"n_levels": 17.0}, r"n_levels = 17\.0"),
        ({"n_levels": 3, "transition": "binomial"}, r"transition = 'binomial': is for n_levels = 2, not 3"),
        ({"n_levels": 2048, "transition": "gaussian"}, r"n_levels = 2048: at most 1024 for transition = 'gaussian'"),
        (
            {"n_levels": 3, "transition": "banded"},
            r"transition = 'banded': must be one of uniform, absorbing, gaussian, binomial",
        ),
        ({"n_levels": 3, "loss_mode": "simple"}, r"loss_mode = 'simple': must be one of bound, hybrid"),
        ({"n_levels": 3, "cross_entropy_weight": -1.0}, r"cross_entropy_weight = -1"),
        ({"n_levels": 3, "cross_entropy_weight": math.inf}, r"cross_entropy_weight = inf"),
        ({"n_levels": 3, "transition": ["uniform"]}, r"transition = \['uniform'\]: must be one of"),
    ],
)
def test_arguments_that_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words) as error:
        DiscreteDiffusion(BetaSchedule(BETA), nn.Identity(), **kwargs)
    assert "\n" not in str(error.value)


def test_symbols_that_are_refused():
    diffusion, _ = build("absorbing")
    good = torch.tensor([[0, 2]])
    calls = {
        "x0: torch.float32": lambda: diffusion.q_sample(good.float(), 1),
        "x0 from 0 to 3": lambda: diffusion.loss(torch.tensor([[0, 3]]), 1),  # the mask is no datum
        "x0 from -1 to 2": lambda: diffusion.variational_bound(torch.tensor([[-1, 2]])),
        "xt from 0 to 4": lambda: diffusion.p_sample(torch.tensor([[0, 4]]), 1),
        "x_prev: torch.int32": lambda: diffusion.q_step(good.int(), 1),
        "x_T from 0 to 9": lambda: next(diffusion.trajectory((1, 2), x_T=torch.tensor([[0, 9]]))),
        "x_T of shape": lambda: next(diffusion.trajectory((1, 3), x_T=good)),
        "noise of shape": lambda: diffusion.q_sample(good, 1, torch.rand(2, 1)),
        "noise: a float: must have the shape of x": lambda: diffusion.q_sample(good, 1, 0.5),
        "x0 of shape": lambda: diffusion.q_posterior(good, torch.tensor([[0, 2], [1, 1]]), 1),
        "t: a bool": lambda: diffusion.loss(good, True),
        "timesteps = True: must be None or lie in": lambda: diffusion.variational_bound(good, timesteps=True),
        "condition: a list": lambda: diffusion.trajectory((1, 2), condition=[1]),
        "t = 5: every t": lambda: diffusion.loss(good, 5),
        "sampler = 'dpm'": lambda: next(diffusion.trajectory((1, 2), "dpm")),
        "eta = 0.5": lambda: next(diffusion.trajectory((1, 2), eta=0.5)),
        "timesteps = 9": lambda: next(diffusion.trajectory((1, 2), timesteps=9)),
        "must descend": lambda: next(diffusion.trajectory((1, 2), timesteps=[1, 2])),
        "number of KL terms": lambda: diffusion.variational_bound(good, timesteps=4),
        "chunk_size = 0": lambda: diffusion.variational_bound(good, chunk_size=0),
        "chunk_size = -1": lambda: diffusion(good, chunk_size=-1),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_a_gaussian_transition_may_have_1024_levels():
    assert DiscreteDiffusion(LinearSchedule(2), nn.Identity(), 1024, "gaussian").n_states == 1024


def test_noise_of_another_shape_is_refused_before_the_network_works():
    diffusion, _ = build("uniform", net=lambda chain: None)  # that would fail
    with pytest.raises(ValueError, match="noise of shape"):
        diffusion.p_sample(torch.zeros(2, 3, dtype=torch.long), 1, torch.rand(3))


def test_a_network_of_another_number_of_levels_is_refused():
    diffusion, _ = build("uniform", net=lambda chain: Table(4, chain.S))
    with pytest.raises(ValueError, match=r"time_aware_net: gives \[1, 2, 4\], where n_levels = 3"):
        diffusion.loss(torch.tensor([[0, 1]]), 1)


class Logits(nn.Module):
    def forward(self, xt, t):
        return torch.zeros(*xt.shape, 4, dtype=torch.float64)


@pytest.mark.parametrize("transition", ["uniform", "absorbing", "gaussian"])
def test_in_float64_it_is_the_same_process(transition):
    x0 = torch.randint(0, 4, (3, 5))
    bounds = []
    for dtype in (torch.float32, torch.float64):
        diffusion = DiscreteDiffusion(LinearSchedule(8, 0.1, 0.3), Logits(), 4, transition).to(dtype)
        bounds.append(diffusion.variational_bound(x0, generator=torch.Generator().manual_seed(0)).total.double())
        assert diffusion.sample((2, 5)).shape == (2, 5)
    torch.testing.assert_close(*bounds, rtol=1e-4, atol=0)


def test_a_network_that_gives_no_tensor_is_named():
    class Pair(nn.Module):
        def forward(self, xt, t):
            return xt, t

    diffusion = DiscreteDiffusion(LinearSchedule(8, 0.1, 0.3), Pair(), 4)
    with pytest.raises(ValueError, match="time_aware_net: gives tuple, where n_levels = 4 asks for logits"):
        diffusion.predict(torch.zeros(2, 3, dtype=torch.long), 1)


def test_a_number_of_steps_may_be_one_of_numpys():
    diffusion = DiscreteDiffusion(LinearSchedule(8, 0.1, 0.3), Logits(), 4)
    assert diffusion.steps(np.int64(5)) == diffusion.steps(5)
