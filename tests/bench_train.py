"""How long does one step of adversarial training take here, against the usual way of writing it?

What  Two steps on the same network, batch size and attack, timed in turn in one process:
      plain  as published single-file code does it: fp32, NCHW, PIL images through torchvision's
             transforms and a DataLoader, an attack by loss.backward() (which computes weight
             gradients only to throw them away), .item() of loss and accuracy at every step;
             kept lean: no clean forward pass for the log, no restarts of the attack;
      ours   ebm_at.Trainer.step.
Why   A claim of speed needs a number that anybody can repeat.
How   python tests/bench_train.py [--model preactresnet18] [--method pgd] [--precision fp32] ...
      EBM_AT_CIFAR10 (or --data) names an .npz with train_images uint8 (N, 32, 32, 3) and
      train_labels; without it the images are noise, which takes the same time.
Read  Chunks alternate (plain, ours, plain, ours ...) and every pair gives one ratio ours / plain: a
      busy machine slows both. Below 1 ours is faster; the MEDIAN counts, min and max tell the noise.
      FLOPs are those of convolutions and matrix products; the FLOOR is the time ours would take at
      the rate of one large matrix product in the same precision. Before anything is timed, both
      sides take a step in fp32 on the same small batch and must agree on loss and new weights.
"""

import contextlib
import platform
import statistics
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

EPS, PGD_STEPS = 8 / 255, 10
SGD = dict(lr=0.1, momentum=0.9, weight_decay=5e-4)


class Images(torch.utils.data.Dataset):
    """uint8 images (N, 32, 32, 3) and labels (N,), one PIL image at a time through `transform`."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def plain_batches(images, labels, batch_size, workers):
    """Augmented batches, epoch after epoch without end."""
    ebm_at.import_torchvision()
    from torchvision import transforms as T

    augment = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor()])
    loader = torch.utils.data.DataLoader(
        Images(images, labels, augment), batch_size, shuffle=True, num_workers=workers,
        drop_last=True, persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        yield from loader


def plain_step(model, optimizer, x, y, method, delta=None):
    """One step on x (N, C, H, W) in [0, 1] and y (N,); delta: start of the attack. -> (loss, acc)."""
    model.train()
    steps, step_size = (1, EPS) if method == "fgsm" else (PGD_STEPS, EPS / 4)
    if delta is None:
        delta = torch.zeros_like(x)
        if method == "pgd":
            delta.uniform_(-EPS, EPS)
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


def make_sides(images, labels, **settings):
    """The same fresh network twice: (plain model, its optimizer, our Trainer)."""
    config = ebm_at.recipe(
        "cifar10", **settings, eps=EPS, attack_steps=PGD_STEPS, attack_bn="train",
        schedule="constant", **SGD,
    )  # fmt: skip
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    names = [str(k) for k in range(10)]
    data = ebm_at.Data(x, y, x[:10], y[:10], x[:10], y[:10], names, "benchmark")
    model, plain = ebm_at.make_model(config.model), ebm_at.make_model(config.model)
    plain.load_state_dict(model.state_dict())
    trainer = ebm_at.Trainer(config, data, model)
    trainer.model.train()
    plain.to(trainer.device, memory_format=torch.contiguous_format)
    return plain, torch.optim.SGD(plain.parameters(), **SGD), trainer


def check_same(images, labels, model, method, n=32):
    """Relative differences of loss and of the weights' update after one step of both, in fp32."""
    settings = dict(model=model, method=method, augment="none", batch_size=n, precision="fp32")
    plain, optimizer, trainer = make_sides(images[:n], labels[:n], **settings)
    x, y = trainer.data.x_train.float() / 255, trainer.data.y_train
    before = torch.nn.utils.parameters_to_vector(plain.parameters()).detach()
    generator = torch.Generator(x.device).manual_seed(1)
    noise = ebm_at.random_noise(x, EPS, generator=generator)  # what our side will draw, for pgd
    start = noise if method == "pgd" else None
    loss = plain_step(plain, optimizer, x.contiguous(), y, method, start)[0]
    found = trainer.step(torch.arange(n, device=x.device), generator.manual_seed(1), 0.0)[0].item()
    theirs, ours = (
        torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in (plain, trainer.model)
    )
    loss_gap = abs(found - loss) / loss
    update_gap = ((ours - theirs).norm() / (theirs - before).norm()).item()
    assert loss_gap < 1e-3, f"the losses differ: plain {loss}, ours {found}"
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
    assert update_gap < 0.02, f"the updates of the weights differ by {update_gap:.1%}"
    return loss_gap, update_gap


def count_flops(step):
    """FLOPs of the convolutions and matrix products in one call of step()."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = contextlib.nullcontext()  # its per-module hooks refuse autograd.grad(.., x)
    counter.mod_tracker.parents = {"Global"}
    with counter:
        step()
    return counter.get_total_flops()


def seconds_per_call(call, count):
    """Mean time of `count` calls, which return None or a loss; reading that waits for a GPU."""
    began = time.perf_counter()
    for _ in range(count):
        loss = call()
    assert loss is None or loss.isfinite().all().item(), "the loss diverged"
    return (time.perf_counter() - began) / count


def main(
    model: Annotated[str, typer.Option(help="small, preactresnet18, ...")] = "small",
    method: Annotated[str, typer.Option(help="fgsm or pgd")] = "fgsm",
    precision: Annotated[str, typer.Option(help="of ours: auto, bf16 or fp32")] = "auto",
    pairs: Annotated[int, typer.Option(help="0: 15 for small, else 3")] = 0,
    batch_size: int = 128,
    workers: Annotated[int, typer.Option(help="of the plain side's DataLoader")] = 0,
    data: Annotated[Optional[Path], typer.Option(envvar="EBM_AT_CIFAR10", help=".npz")] = None,
):
    """Times our training step against a plain one."""
    if method not in ("fgsm", "pgd"):
        raise typer.BadParameter("--method must be fgsm or pgd")
    rng, source = np.random.default_rng(0), "noise images"
    images, labels = rng.integers(0, 256, (5000, 32, 32, 3), np.uint8), rng.integers(0, 10, 5000)
    if data is not None:
        archive, source = np.load(data, allow_pickle=False), data.name
        images, labels = archive["train_images"], archive["train_labels"].reshape(-1).astype("int64")
    torch.manual_seed(0)
    loss_gap, update_gap = check_same(images, labels, model, method)

    settings = dict(model=model, method=method, batch_size=batch_size, precision=precision)
    plain, optimizer, trainer = make_sides(images, labels, augment="crop-flip", **settings)
    batches, loading = plain_batches(images, labels, batch_size, workers), []
    generator = torch.Generator(trainer.device).manual_seed(0)

    def plain_call():
        loading.append(-time.perf_counter())
        x, y = (t.to(trainer.device) for t in next(batches))
        loading[-1] += time.perf_counter()
        plain_step(plain, optimizer, x, y, method)

    def our_call():
        rows = torch.randint(len(labels), (batch_size,), generator=generator, device=trainer.device)
        return trainer.step(rows, generator, 0.0)[0]

    chunk = 4 if model == "small" else 1
    pairs = pairs or (15 if model == "small" else 3)
    work = [count_flops(call) for call in (plain_call, our_call)]
    for call in (plain_call, our_call):  # warm-up
        seconds_per_call(call, chunk)
    loading.clear()
    times = [[seconds_per_call(c, chunk) for c in (plain_call, our_call)] for _ in range(pairs)]
    square = torch.randn(2048, 2048, device=trainer.device, dtype=trainer.dtype)
    rate = 2 * 2048**3 / min(seconds_per_call(lambda: (square @ square)[0, 0], 1) for _ in range(5))

    table = Table(title=f"{model}, {method}, batch {batch_size}: {pairs} pairs of {chunk} step(s)")
    for heading in ("", "median s/step", "images/s", "GFLOP/step", "GFLOP/s"):
        table.add_column(heading, justify="right")
    for name, taken, flops in zip(("plain", "ours"), zip(*times), work):
        s, gflops = statistics.median(taken), flops / 1e9
        cells = f"{s:.4f}", f"{batch_size / s:.0f}", f"{gflops:.2f}", f"{gflops / s:.0f}"
        table.add_row(name, *cells)
    ratios = [ours / theirs for theirs, ours in times]
    middle, load = statistics.median(ratios), statistics.median(loading)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"ratio ours / plain: median {middle:.3f} ({1 / middle:.2f}x as fast),"
        f" min {min(ratios):.3f}, max {max(ratios):.3f}; loading takes {load:.4f} s of a plain step\n"
        f"floor of ours: {work[1] / rate:.4f} s, at the {rate / 1e9:.0f} GFLOP/s of a 2048^3 matmul\n"
        f"same maths: loss differs by {loss_gap:.0e}, the weights' update by {update_gap:.0e}\n"
        f"{platform.platform()}, {trainer.device}, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}, ours {trainer.dtype}, plain torch.float32, {source}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)
