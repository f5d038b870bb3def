"""The oracle of the tests: what the textbook formulas and Bayes' rule say, in float64 and apart from the library.

`Textbook` holds the formulas of Ho et al. 2020, `Mixture` is data whose every expectation is known, `OptimalNet` is the network
that no training can beat on it.
"""

import math

import torch
from torch import Tensor, nn

from beta_schedule import BetaSchedule

PREDICTIONS = ("direct", "reconstruction", "denoising", "velocity")
VARIANCES = ("beta", "sigma_bar_square", "learnable")


class Textbook:
    """Ho et al. 2020, section 2, from beta_1..beta_T [T]. Every table is float64 and indexed by t itself, 0..T."""

    def __init__(self, beta: Tensor):
        self.T = len(beta)
        self.beta = torch.cat([torch.zeros(1, dtype=torch.float64), beta])
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)
        self.previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])  # alpha_bar_{t-1}
        noise = 1 - self.alpha_bar
        # equation 7 of the paper, the posterior q(x_{t-1} | x_t, x_0)
        self.mu_from_x0 = self.previous.sqrt() * self.beta / noise
        self.mu_from_xt = self.alpha.sqrt() * (1 - self.previous) / noise
        self.posterior_variance = self.beta * (1 - self.previous) / noise
        # how an error in x_0 shows in each prediction, x_t being known
        self.error_from_x0 = {
            "direct": self.mu_from_x0,
            "reconstruction": torch.ones_like(noise),
            "denoising": (self.alpha_bar / noise).sqrt(),  # eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)
            "velocity": noise.rsqrt(),  # v = (sqrt(alpha_bar) x_t - x_0) / sqrt(1 - alpha_bar)
        }

    def sigma_square(self, reverse_variance: str) -> Tensor:
        """The fixed variances [T + 1]; sigma_bar_1^2 is taken as beta_1."""
        if reverse_variance == "beta":
            return self.beta
        return torch.where(torch.arange(self.T + 1) == 1, self.beta, self.posterior_variance)

    def xt(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of x_0, eps [B, D] and t [B]."""
        alpha_bar = self.alpha_bar[t, None]
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps

    def target(self, prediction: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should say, for x_0, eps [B, D] and t [B]."""
        alpha_bar = self.alpha_bar[t, None]
        return {
            "direct": self.mu_from_x0[t, None] * x0 + self.mu_from_xt[t, None] * self.xt(x0, eps, t),
            "reconstruction": x0,
            "denoising": eps,
            "velocity": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0,  # Salimans & Ho 2022, appendix D
        }[prediction]


class Mixture:
    """sum_k weight_k N(mean_k, variance_k I) in D dimensions: weights [K], means [K, D], variances [K]."""

    def __init__(self, weights: list, means: list, variances: list):
        self.weights, self.means, self.variances = (torch.tensor(x, dtype=torch.float64) for x in (weights, means, variances))
        self.n = self.means.shape[1]

    def sample(self, size: int) -> Tensor:
        """Float32 [size, D]."""
        k = torch.multinomial(self.weights, size, replacement=True)
        return (self.means[k] + self.variances[k, None].sqrt() * torch.randn(size, self.n)).float()

    def log_prob(self, x: Tensor, alpha_bar: Tensor | float = 1.0) -> Tensor:
        """log density [B] of x [B, D], the data noised to alpha_bar (1: the data itself)."""
        return self._joint(x.double(), torch.as_tensor(alpha_bar, dtype=torch.float64).expand(len(x))).logsumexp(1)

    def _joint(self, xt: Tensor, alpha_bar: Tensor) -> Tensor:
        """log (weight_k density_k(x_t)) [B, K], given alpha_bar [B]."""
        distance = (xt[:, None] - alpha_bar.sqrt()[:, None, None] * self.means).square().sum(2)
        variance = alpha_bar[:, None] * self.variances + 1 - alpha_bar[:, None]
        return self.weights.log() - 0.5 * (distance / variance + self.n * (2 * math.pi * variance).log())

    def entropy(self, size: int = 200_000) -> float:
        """Nats per dimension: exact for one Gaussian, else by Monte Carlo in float64."""
        if len(self.weights) == 1:
            return 0.5 * math.log(2 * math.pi * math.e * self.variances.item())
        return -self.log_prob(self.sample(size)).mean().item() / self.n

    def components(self) -> list["Mixture"]:
        """Each Gaussian by itself."""
        parts = zip(self.means.tolist(), self.variances.tolist(), strict=True)
        return [Mixture([1.0], [mean], [variance]) for mean, variance in parts]

    def x0_error(self, alpha_bar: Tensor) -> Tensor:
        """E||x_0 - E[x_0 | x_t]||^2 / n of one Gaussian, at each alpha_bar."""
        return self.variances * (1 - alpha_bar) / (alpha_bar * self.variances + 1 - alpha_bar)


class OptimalNet(nn.Module):
    """E[target | x_t] for a mixture: given the component, target and x_t are jointly Gaussian, so a linear regression each."""

    def __init__(self, mixture: Mixture, beta: Tensor, prediction: str):
        super().__init__()
        self.mixture, self.prediction, self.book = mixture, prediction, Textbook(beta)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        xt, means, variances = xt.double(), self.mixture.means, self.mixture.variances
        alpha_bar, alpha, previous = (x[t, None] for x in (self.book.alpha_bar, self.book.alpha, self.book.previous))
        noise = 1 - alpha_bar
        # mean of the target as a multiple of mean_k [B, 1], and its covariance with x_t [B, K]
        mean_factor, covariance = {
            "direct": (previous.sqrt(), alpha.sqrt() * (previous * variances + 1 - previous)),  # of x_{t-1}: E is mu_bar's
            "reconstruction": (torch.ones_like(noise), alpha_bar.sqrt() * variances),
            "denoising": (torch.zeros_like(noise), noise.sqrt().expand(-1, len(variances))),
            "velocity": (-noise.sqrt(), (alpha_bar * noise).sqrt() * (1 - variances)),
        }[self.prediction]
        gain = covariance / (alpha_bar * variances + noise)
        centred = xt[:, None] - alpha_bar[..., None].sqrt() * means  # [B, K, D]
        given_k = mean_factor[..., None] * means + gain[..., None] * centred
        share = self.mixture._joint(xt, alpha_bar[:, 0]).softmax(1)
        return (share[..., None] * given_k).sum(1)


GAUSSIAN = Mixture([1.0], [[0.4, -0.6]], [0.3])
MIXTURE = Mixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.4]], [0.02, 0.06])


def even_in_log_snr(steps: int) -> BetaSchedule:
    """Log snr falls from 7 to -5 in even steps. No step is wide, so that what few steps lose vanishes like 1 / T."""
    alpha_bar = torch.linspace(7, -5, steps, dtype=torch.float64).sigmoid()
    return BetaSchedule(1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]]))


class Correlated:
    """N(mean, covariance) in D dimensions: mean [D], covariance [D, D], float64."""

    def __init__(self, mean: Tensor, covariance: Tensor):
        self.mean, self.covariance = mean.double(), covariance.double()
        self.n = len(mean)

    def sample(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Float64 [size, D]."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp(min=0).sqrt()  # a posterior may know a direction exactly
        return self.mean + torch.randn(size, self.n, dtype=torch.float64, generator=generator) @ root.T

    def given(self, matrix: Tensor, y: Tensor, noise: float) -> "Correlated":
        """The posterior, y = matrix x + noise z being known, for y [M]: Bayes' rule for Gaussians."""
        cross = self.covariance @ matrix.T
        gain = torch.linalg.solve(matrix @ cross + noise**2 * torch.eye(len(matrix), dtype=torch.float64), cross.T).T
        return Correlated(self.mean + gain @ (y - matrix @ self.mean), self.covariance - gain @ cross.T)


class CorrelatedNet(nn.Module):
    """E[x_0 | x_t] of Correlated data, for images of any shape with D values. Autograd goes through it."""

    def __init__(self, data: Correlated, beta: Tensor):
        super().__init__()
        self.data, self.book = data, Textbook(beta)
        self.values, self.vectors = torch.linalg.eigh(data.covariance)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self.book.alpha_bar[t, None]
        centred = (xt.double().flatten(1) - alpha_bar.sqrt() * self.data.mean) @ self.vectors
        gain = alpha_bar.sqrt() * self.values / (alpha_bar * self.values + 1 - alpha_bar)
        return (self.data.mean + (gain * centred) @ self.vectors.T).view(xt.shape)


class LabelNet(nn.Module):
    """The optimal network for classes of data, net(xt, t, label). Without a label, or with label K, it is that of `none`."""

    def __init__(self, classes: list[Mixture], none: Mixture, beta: Tensor, prediction: str):
        super().__init__()
        self.nets = nn.ModuleList(OptimalNet(data, beta, prediction) for data in (*classes, none))
        self.n_classes, self.rows = len(classes), []  # how many rows each call had

    def forward(self, xt: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.rows.append(len(xt))
        if label is None:
            return self.nets[-1](xt, t)
        out = torch.empty(xt.shape, dtype=torch.float64)
        for i, net in enumerate(self.nets):
            out[label == i] = net(xt[label == i], t[label == i])
        return out


def smooth_images(side: int = 4) -> Correlated:
    """Images [3, side, side] whose neighbouring pixels and whose channels are alike."""
    place = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2)
    near = torch.exp(-torch.cdist(place, place) / 2)
    channels = 0.8 + 0.2 * torch.eye(3, dtype=torch.float64)
    mean = torch.linspace(-0.5, 0.5, 3 * side**2, dtype=torch.float64)
    return Correlated(mean, 0.25 * torch.kron(channels, near))
