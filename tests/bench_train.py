"""How long does one step of adversarial training take here, against the usual way of writing it?

What  Two steps on the same network, batch size and attack, timed in turn in one process. Plain: as
      published single-file code does it, in fp32 and NCHW, PIL images through torchvision and a
      DataLoader, an attack by loss.backward() (which computes weight gradients only to throw them
      away), .item() at every step; kept lean: no clean pass for the log. Ours: Trainer.step.
Why   A claim of speed needs a number that anybody can repeat.
How   python tests/bench_train.py [--model preactresnet18] [--method pgd] [--precision fp32] ...
      EBM_AT_CIFAR10 (or --data) names an .npz with train_images uint8 (N, 32, 32, 3) and
      train_labels; without it the images are noise, which takes the same time.
Read  Every pair of chunks (plain, ours) gives one ratio ours / plain; below 1 ours is faster. The
      MEDIAN counts. On a busy machine set OMP_NUM_THREADS=1: threads waiting for others spin.
      FLOOR: the time of our FLOPs at the rate of one large matrix product in our precision.
"""

import contextlib
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ebm_at  # noqa: E402

EPS = 8 / 255
ATTACK = {"fgsm": (1, EPS), "pgd": (10, EPS / 4)}  # number of steps, length of a step
SGD = dict(lr=0.1, momentum=0.9, weight_decay=5e-4)
SAME = dict(eps=EPS, attack_bn="train", schedule="constant")  # so that ours does the same


class Images(torch.utils.data.Dataset):
    """uint8 images (N, 32, 32, 3) and labels (N,), one PIL image at a time through `transform`."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def plain_batches(images, labels, size, workers):
    """Augmented batches, epoch after epoch without end."""
    T = ebm_at.import_torchvision().transforms
    augment = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor()])
    data, options = Images(images, labels, augment), dict(num_workers=workers, drop_last=True)
    while True:
        yield from torch.utils.data.DataLoader(data, size, shuffle=True, **options)


def plain_step(model, optimizer, x, y, delta, steps, step_size):
    """One step on x (N, C, H, W) in [0, 1] and y (N,), the attack from x + delta; -> loss, acc."""
    delta = torch.clamp(x + delta, 0, 1) - x
    for _ in range(steps):
        delta.requires_grad_(True)
        F.cross_entropy(model(x + delta), y).backward()
        with torch.no_grad():
            delta = torch.clamp(delta + step_size * delta.grad.sign(), -EPS, EPS)
            delta = torch.clamp(x + delta, 0, 1) - x
    optimizer.zero_grad()
    logits = model(x + delta)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    optimizer.step()
    return loss.item(), (logits.argmax(1) == y).float().mean().item()


def make_sides(images, labels, **more):
    """The same fresh network twice: (plain model, its optimizer, our Trainer)."""
    config = ebm_at.recipe("cifar10", **SAME, **SGD, **more)
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    data = ebm_at.Data(x, y, x[:10], y[:10], x[:10], y[:10], list("0123456789"), "benchmark")
    model, plain = ebm_at.make_model(config.model), ebm_at.make_model(config.model)
    plain.load_state_dict(model.state_dict())
    trainer = ebm_at.Trainer(config, data, model.train())
    plain.train().to(trainer.device, memory_format=torch.contiguous_format)
    return plain, torch.optim.SGD(plain.parameters(), **SGD), trainer


def check_same(images, labels, model, method, n=8):
    """Both take a step on the same images; asserts the same loss and weights, returns their gaps.

    The networks run in float64 here, all else in fp32: rounding in fp32 flips the signs of a few
    small input gradients, which alone moves a deep network's weight gradients by 20%.
    """
    settings = dict(model=model, method=method, batch_size=n, augment="none", precision="fp32")
    plain, optimizer, trainer = make_sides(images[:n], labels[:n], **settings)
    for net in (plain, trainer.model):
        net.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    x, y = trainer.data.x_train.float() / 255, trainer.data.y_train
    before = [p.detach().clone() for p in plain.parameters()]
    generator = torch.Generator(x.device).manual_seed(1)
    delta = ebm_at.random_noise(x, EPS, generator=generator) if method == "pgd" else 0 * x
    loss = plain_step(plain, optimizer, x.contiguous(), y, delta, *ATTACK[method])[0]
    generator.manual_seed(1)  # so that ours draws the same noise
    found = trainer.step(torch.arange(n, device=x.device), generator, 0.0)[0].item()
    gaps = [abs(found - loss) / loss]
    for old, new, ours in zip(before, plain.parameters(), trainer.model.parameters()):
        gaps.append(((ours - new).norm() / (new - old).norm()).item())
    assert max(gaps) < 1e-3, f"loss: plain {loss}, ours {found}; gaps of the updates: {gaps[1:]}"
    return gaps[0], max(gaps[1:])


def count_flops(step):
    """FLOPs of the convolutions and matrix products in one call of step()."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = contextlib.nullcontext()  # its own hooks refuse autograd.grad(.., x)
    counter.mod_tracker.parents = {"Global"}
    with counter:
        step()
    return counter.get_total_flops()


def seconds_per_call(call, count=1):
    """Mean time of `count` calls that return a scalar; reading the last waits for a GPU."""
    began = time.perf_counter()
    float([call() for _ in range(count)][-1])
    return (time.perf_counter() - began) / count


def main(model: str = "small", method: str = "fgsm", precision: str = "auto", workers: int = 0,
         batch_size: int = 128, pairs: Annotated[int, typer.Option(help="0: 15 or 3")] = 0,
         data: Annotated[Optional[Path], typer.Option(envvar="EBM_AT_CIFAR10")] = None):
    """Times our training step against a plain one (--method fgsm or pgd)."""
    ebm_at.check_choice("method", method, ATTACK)
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (5000, 32, 32, 3), np.uint8)
    labels = np.arange(5000) % 10
    if data is not None:
        archive = np.load(data, allow_pickle=False)
        images, labels = archive["train_images"], archive["train_labels"].flatten().astype("int64")
    gaps = check_same(images, labels, model, method)
    settings = dict(batch_size=batch_size, precision=precision, augment="crop-flip")
    plain, optimizer, trainer = make_sides(images, labels, model=model, method=method, **settings)
    batches = plain_batches(images, labels, batch_size, workers)
    device, generator = trainer.device, torch.Generator(trainer.device).manual_seed(0)

    def plain_one():
        x, y = (t.to(device) for t in next(batches))
        delta = torch.zeros_like(x) if method == "fgsm" else torch.rand_like(x) * 2 * EPS - EPS
        return plain_step(plain, optimizer, x, y, delta, *ATTACK[method])[0]

    def our_one():
        rows = torch.randint(len(labels), (batch_size,), generator=generator, device=device)
        return trainer.step(rows, generator, 0.0)[0]

    chunk, pairs = (4, pairs or 15) if model == "small" else (1, pairs or 3)
    work = [count_flops(call) / 1e9 for call in (plain_one, our_one)]
    times = [[seconds_per_call(c, chunk) for c in (plain_one, our_one)] for _ in range(pairs + 1)]
    theirs, ours = np.array(times[1:]).T  # the first pair is warm-up
    ratios, load = ours / theirs, seconds_per_call(lambda: next(batches)[1][0], 4)
    square = torch.randn(2048, 2048, device=device, dtype=trainer.dtype)
    rate = 2 * 2.048**3 / min(seconds_per_call(lambda: (square @ square)[0, 0]) for _ in range(5))
    table = Table("", "median s/step", "images/s", "GFLOP/step", "GFLOP/s")
    for name, s, g in (("plain", np.median(theirs), work[0]), ("ours", np.median(ours), work[1])):
        table.add_row(name, f"{s:.4f}", f"{batch_size / s:.0f}", f"{g:.2f}", f"{g / s:.0f}")
    Console(highlight=False, soft_wrap=True).print(table, f"""\
{model}, {method}, batch {batch_size}, {pairs} pairs of {chunk} step(s)
ratio ours / plain: median {np.median(ratios):.3f}, min {ratios.min():.3f}, max {ratios.max():.3f}
plain spends {load:.4f} s on loading; floor of ours {work[1] / rate:.4f} s at {rate:.0f} GFLOP/s
same maths: loss within {gaps[0]:.0e}, update of the weights within {gaps[1]:.0e}
{platform.platform()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__},
ours {trainer.dtype}, plain torch.float32, images: {data.name if data else "noise"}""")


if __name__ == "__main__":
    typer.run(main)
