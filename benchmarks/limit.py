"""What this machine can do at best, what share of it our steps use, and what our own code adds to the network's calls.

    python benchmarks/limit.py             # minutes
    python benchmarks/limit.py --quick     # seconds, a small network

The limits are measured here, not taken from a data sheet: a product of two large square matrices, a 3x3 convolution of the
network's middle size in its better memory layout, and a copy. The share is counted operations (torch.utils.flop_counter, a
multiplication with its addition counts as two) a second, over the rate of the matrix product in the same precision. In each
row of a precision torch's switches are train.py's for it, on both sides. What our code adds is measured in the precision that
"auto" finds here, the bare loops in the same.
"""

import statistics

import torch
import torch.nn.functional as F
from common import counted, interleaved, median_ratio, options, start, trainer, write

from samplers import SAMPLERS
from train import Trainer
from training.speed import PRECISIONS, autocast, has_bfloat16, set_flags


def precisions(device: torch.device) -> list[str]:
    """Those that the device has in hardware."""
    if device.type == "cuda":
        return list(PRECISIONS)
    return ["fp32", "bf16"] if has_bfloat16(device) else ["fp32"]


@torch.no_grad()
def machine(args, device: torch.device) -> list[dict]:
    """Rates of a matrix product, a convolution and a copy, the best of the rounds, in each precision."""
    n, batch, side = args.matrix, args.batch_size, args.image_size // 2
    rows = []
    for precision in precisions(device):
        set_flags(precision)
        dtype = PRECISIONS[precision] or torch.float32
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        x = torch.randn(batch, 256, side, side, device=device).to(dtype)
        w = torch.randn(256, 256, 3, 3, device=device).to(dtype)
        x_last, w_last = (y.to(memory_format=torch.channels_last) for y in (x, w))
        copied = torch.empty(args.copy_mib * 2**20 // dtype.itemsize, dtype=dtype, device=device).zero_()
        into = torch.empty_like(copied)
        works = {
            "matmul": (2 * n**3, lambda: a @ b),  # noqa: B023
            "conv": (2 * batch * side**2 * 256 * 256 * 9, lambda: F.conv2d(x, w, padding=1)),  # noqa: B023
            "conv, channels_last": (2 * batch * side**2 * 256 * 256 * 9, lambda: F.conv2d(x_last, w_last, padding=1)),  # noqa: B023
            "copy": (2 * copied.nbytes, lambda: into.copy_(copied)),  # noqa: B023
        }
        seconds = interleaved({name: call for name, (_, call) in works.items()}, device, args.rounds, args.inner)
        rate = {name: amount / min(seconds[name]) for name, (amount, _) in works.items()}
        rows.append(
            {
                "precision": precision,
                "matmul TFLOP/s": rate["matmul"] / 1e12,
                "conv TFLOP/s": max(rate["conv"], rate["conv, channels_last"]) / 1e12,
                "copy GB/s, read + written": rate["copy"] / 1e9,
            }
        )
    return rows


def steps_of(run: Trainer, calls: int) -> dict:
    """A training step and a sampling run of that many network calls, as train.py and test.py do them."""
    pixels, _ = next(run.train_data.epoch(0))
    shape, times = pixels.shape, list(range(run.model.T, run.model.T - calls, -1))

    def sample():
        with autocast(run.device, run.cfg.precision):
            run.ema.sample(shape, "ddpm", times, clip_x0=True)

    return {"training step": lambda: run.train_step(pixels), "sampling step": sample}


def share(args, device: torch.device, limits: list[dict]) -> list[dict]:
    """Counted operations a second of our steps, over what the machine was measured to do."""
    rows = []
    for limit in limits:
        precision = limit["precision"]
        if precision == "fp16":  # the cost of bf16
            continue
        for compiled in (False, True) if args.compile else (False,):
            run = trainer(device, args.network, args.batch_size, args.image_size, precision=precision, compile=compiled)
            if not compiled:
                flops = {name: counted(step) for name, step in steps_of(run, 1).items()}
            calls = {"training step": 1, "sampling step": min(4, args.steps)}
            seconds = interleaved(steps_of(run, calls["sampling step"]), device, args.rounds, args.inner)
            for name, times in seconds.items():
                middle = statistics.median(times) / calls[name]
                rows.append(
                    {
                        "step": name,
                        "precision": precision,
                        "compiled": compiled,
                        "ms": 1000 * middle,
                        "GFLOP": flops[name] / 1e9,
                        "TFLOP/s": flops[name] / middle / 1e12,
                        "% of matmul": 100 * flops[name] / middle / 1e12 / limit["matmul TFLOP/s"],
                        "% of conv": 100 * flops[name] / middle / 1e12 / limit["conv TFLOP/s"],
                    }
                )
    return rows


def added(args, device: torch.device) -> list[dict]:
    """What the sampler adds to its network calls, and the trainer to a loop of forward, backward and optimizer step."""
    run = trainer(device, args.network, args.batch_size, args.image_size, seed=1)
    model, net = run.model, run.model.time_aware_net
    precision = run.cfg.precision
    bare_run = trainer(device, args.network, args.batch_size, args.image_size, seed=1, precision=precision)
    bare, optimizer = bare_run.model, bare_run.optimizer  # with a state of its own
    batches = forever(run)
    x0 = run.train_data.images.to_float(next(batches)[0])
    noise, t = torch.randn_like(x0), torch.randint(1, model.T + 1, (len(x0),), device=device)

    def bare_step():
        with autocast(device, precision):
            loss = F.mse_loss(bare.time_aware_net(x0, t), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    training = {"whole": lambda: run.train_step(*next(batches)), "bare": bare_step}
    seconds = {"training step / forward, backward, optimizer": interleaved(training, device, args.rounds, args.inner)}

    model.eval()
    image = x0.contiguous()

    for sampler in SAMPLERS:
        calls = model.network_calls(args.steps, sampler)

        def sample():
            with autocast(device, precision):
                model.sample(image.shape, sampler, args.steps, clip_x0=True, x_T=image)  # noqa: B023

        @torch.no_grad()
        def bare_calls():
            x = image
            with autocast(device, precision):
                for _ in range(calls):  # noqa: B023
                    x = net(x, t).to(x.dtype)

        timed = interleaved({"whole": sample, "bare": bare_calls}, device, args.rounds, warmup=1)
        seconds[f"{sampler}, {args.steps} steps / {calls} network calls"] = timed
    return [
        {
            "what": name,
            "ms": 1000 * statistics.median(timed["whole"]),
            "bare ms": 1000 * statistics.median(timed["bare"]),
            "added %": 100 * (median_ratio(timed["whole"], timed["bare"]) - 1),
        }
        for name, timed in seconds.items()
    ]


def forever(run: Trainer):
    """The trainer's own batches without end."""
    epoch = 0
    while True:
        yield from run.train_data.epoch(epoch)
        epoch += 1


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--matrix", type=int, help="rows of the square matrices")
    parser.add_argument("--copy-mib", type=int, help="MiB that are copied")
    parser.add_argument("--steps", type=int, help="steps in a sampling run")
    parser.add_argument("--inner", type=int, help="calls in one timing")
    parser.add_argument("--no-compile", dest="compile", action="store_const", const=False, help="compile nothing")
    parser.set_defaults(compile=None)
    args = parser.parse_args(argv)
    device = start(
        args,
        cpu=dict(network="cifar10", batch_size=4, rounds=3, matrix=2048, copy_mib=256, steps=50, inner=1, compile=False),
        cuda=dict(network="cifar10", batch_size=128, rounds=7, matrix=8192, copy_mib=1024, steps=50, inner=10, compile=True),
        quick=dict(network="small", batch_size=4, rounds=3, matrix=512, copy_mib=64, steps=3, inner=1, compile=False),
    )
    torch.manual_seed(0)
    limits = machine(args, device)
    tables = {
        "Limits of this machine": limits,
        "What our code adds": added(args, device),
        "Share of the limits that our steps use": share(args, device, limits),
    }
    write("limit", args, device, tables)


if __name__ == "__main__":
    main()
