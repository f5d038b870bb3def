"""How far each way of conditioning on a measurement is from the exact posterior, by method and number of network calls.

    python benchmarks/editing.py               # minutes
    python benchmarks/editing.py --quick       # fewer samples

The data are Gaussian images, 3 x 4 x 4, of known covariance, and the network is the optimal one, so that the posterior given
y = A x_0 + noise is a Gaussian that is known, and every difference is the method's. The tasks: `inpainting` (the left half is
known), `super-resolution` (means of 2 x 2 pixels are known), `colouring` (means over the channels are known).

    RePaint          editing.inpaint (Lugmayr et al. 2022)
    DDNM             x_0_hat + A' (A A' + noise^2 / r^2)^-1 (y - A x_0_hat): the covariance V of p(x_0 | x_t) is taken for r^2 I
                     (Wang et al. 2023, arXiv:2212.00490; without noise r does not matter and it is theirs)
    PiGDM            x_0_hat + V A' (r^2 A A' + noise^2)^-1 (y - A x_0_hat): the same, but the last product, one derivative of
                     the network, is with the true V (Song et al. 2023, "Pseudoinverse-guided diffusion models")
    moment matching  the true V in both places: editing.posterior_sample (Rozet et al. 2024)

r^2 is the best number for such data, v (1 - alpha_bar) / (alpha_bar v + 1 - alpha_bar) with v = 0.25, a pixel's variance.

Columns: calls of the network, and its derivatives backwards. `mean`: distance of the samples' mean from the exact one, over the
square root of the posterior's total variance. `spread`: the samples' total variance over the exact one, less 1. `covariance`:
distance of the covariance over the norm of the exact one. `misfit`: root mean square of y - A x_0 of the samples, less that of
the posterior. The row "exact" has as many exact samples: no method can be told from the posterior below that.

benchmarks/README.md has the figures, and what follows from them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import ROOT, write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from closed_form import Correlated, CorrelatedNet, smooth_images

from beta_schedule import LinearSchedule
from editing import _adjoint, _conjugate_gradients, _x0_and_covariance, inpaint, posterior_sample
from gaussian_diffusion import GaussianDiffusion
from samplers import SAMPLERS

SHAPE = (3, 4, 4)
VARIANCE = 0.25  # of a pixel
MASK = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4)
TASKS = {"inpainting": lambda x: x[..., :2], "super-resolution": lambda x: F.avg_pool2d(x, 2), "colouring": lambda x: x.mean(1)}


class Counting(CorrelatedNet):
    """The optimal network, which counts its calls and derivatives."""

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        out = super().forward(xt, t)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, _: Tensor) -> None:
        self.derivatives += 1


def by_pseudo_inverse(diffusion, y, operator, noise, shape, sampler, timesteps, eta, through_covariance) -> Tensor:
    """DDNM, or PiGDM where the correction goes through the covariance."""
    adjoint = _adjoint(operator, y, shape)

    def rule(predict_x0, x, levels, normal) -> Iterator[Tensor]:
        alpha_bar = {level.t: level.alpha_bar for level in levels}

        def given_y(x: Tensor, t: int) -> Tensor:
            variance = VARIANCE * (1 - alpha_bar[t]) / (alpha_bar[t] * VARIANCE + 1 - alpha_bar[t])
            x0, covariance = _x0_and_covariance(predict_x0, x, t, alpha_bar[t])
            u = _conjugate_gradients(  # these A have A A' in proportion to 1, so that two iterations are all
                lambda v: variance * operator(adjoint(v)) + noise * noise * v, y - operator(x0), 2
            )
            return x0 + (covariance(adjoint(u)) if through_covariance else variance * adjoint(u))

        run = partial(SAMPLERS[sampler], eta=eta) if eta else SAMPLERS[sampler]
        return run(given_y, x, levels, normal)

    return diffusion.sample(shape, rule, diffusion.steps(timesteps, sampler))


def methods() -> dict[tuple[str, int], Callable]:
    """By name and number of steps: samples of (diffusion, y, operator, noise, shape)."""
    found = {}
    for steps in (20, 100):
        for sampler, eta in (("ddim", 0.85), ("dpm", 0.0)):
            name = f"DDNM, {sampler}{f' {eta}' if eta else ''}"
            found[name, steps] = partial(by_pseudo_inverse, sampler=sampler, timesteps=steps, eta=eta, through_covariance=False)
        for sampler, eta in (("ddim", 1.0), ("dpm", 0.0)):
            name = f"PiGDM, {sampler}{f' {eta:g}' if eta else ''}"
            found[name, steps] = partial(by_pseudo_inverse, sampler=sampler, timesteps=steps, eta=eta, through_covariance=True)
    for steps in (20, 100):
        for sampler, iterations in (("ddpm", 5), ("ddim", 5), ("dpm", 1), ("dpm", 3), ("dpm", 5), ("dpm", 10)):
            name = f"moment matching, {sampler}, {iterations} iterations"
            found[name, steps] = partial(posterior_sample, sampler=sampler, timesteps=steps, iterations=iterations)
    return found


def repaint() -> dict[tuple[str, int], Callable]:
    """The same of RePaint: samples of (diffusion, x0)."""
    found = {}
    for steps, resamplings, jump in ((20, 1, 1), (100, 1, 1), (20, 5, 1), (100, 10, 1), (100, 10, 10), (100, 50, 1)):
        name = f"RePaint, {resamplings} x, jump {jump}"
        found[name, steps] = partial(inpaint, mask=MASK, timesteps=steps, resamplings=resamplings, jump=jump)
    return found


def differences(x: Tensor, exact: Correlated, matrix: Tensor, y: Tensor) -> dict[str, float]:
    """Of samples x [N, D] from the exact posterior: see the head of this file."""
    total = exact.covariance.trace()
    covariance = x.T.cov()
    misfit = (matrix @ exact.covariance @ matrix.T).trace() + (y - matrix @ exact.mean).square().sum()
    return {
        "mean": ((x.mean(0) - exact.mean).norm() / total.sqrt()).item(),
        "spread": (covariance.trace() / total - 1).item(),
        "covariance": ((covariance - exact.covariance).norm() / exact.covariance.norm()).item(),
        "misfit": ((y - x @ matrix.T).square().mean().sqrt() - (misfit.clamp(min=0) / len(y)).sqrt()).item(),
    }


def table(task: str, noise: float, size: int, data: Correlated) -> list[dict]:
    """One row a method and number of steps."""
    torch.manual_seed(0)
    schedule, operator = LinearSchedule(1000), TASKS[task]
    matrix = operator(torch.eye(data.n, dtype=torch.float64).view(-1, *SHAPE)).flatten(1).T
    x0 = data.sample(1)[0]
    y = matrix @ x0 + noise * torch.randn(len(matrix), dtype=torch.float64)
    exact = data.given(matrix, y, noise)
    head = {"method": "exact", "steps": 0, "calls": 0, "derivatives": 0}
    rows = [head | differences(exact.sample(size), exact, matrix, y)]
    one = operator(torch.zeros(1, *SHAPE))
    ys = y.float().view(one.shape).expand(size, *one.shape[1:])
    inpainting = repaint() if (task, noise) == ("inpainting", 0) else {}
    for (name, steps), method in (inpainting | methods()).items():
        net = Counting(data, schedule.beta)
        net.calls = net.derivatives = 0
        diffusion = GaussianDiffusion(schedule, net, "beta", "reconstruction")
        torch.manual_seed(1)
        if name.startswith("RePaint"):
            x = method(diffusion, x0.float().view(1, *SHAPE).expand(size, *SHAPE))
        else:
            x = method(diffusion, ys, operator, noise, (size, *SHAPE))
        counts = {"method": name, "steps": steps, "calls": net.calls, "derivatives": net.derivatives}
        rows.append(counts | differences(x.flatten(1).double(), exact, matrix, y))
        print(task, noise, {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-n", "--samples", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer samples, to see that it runs")
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"), help="folder of the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size, data = min(args.samples, 200) if args.quick else args.samples, smooth_images(4)
    tables = {f"{task}, noise {noise:g}": table(task, noise, size, data) for task in TASKS for noise in (0.0, 0.1)}
    write("editing", args, torch.device("cpu"), tables)


if __name__ == "__main__":
    main()
