"""How many images per second does `generate` make, against the usual way of writing it?

What  1. The same model and the same number of images of each class, by a plain loop and by ours.
         Plain: one class at a time, a full PCA by SVD of its training images at every call, class
         mean + .35 std along every component, a fixed number of steps in fp32, the gradient by
         loss.backward() (weight gradients and all). Ours: PCA fitted once (its time is counted),
         local starts, adaptive stopping. Frechet distances of both from an ordinary classifier.
      2. How the time of ours grows with the number of images, of classes, and with their size.
Why   A claim of speed needs a number that anybody can repeat, and it is none at worse quality.
How   python tests/bench_generate.py CHECKPOINT JUDGE [--per-class 100] [--rounds 3]
      CHECKPOINT: a robust run, JUDGE: a run of `cli.py train --method none` on the same data.
Read  Both are timed in turn in one process; the MEDIAN of the ratios counts. On a busy machine set
      OMP_NUM_THREADS=1: threads waiting for others spin.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli  # noqa: E402
import ebm_at  # noqa: E402


def plain(model, x, y, classes, per_class, steps):
    """Images as plain code makes them: float (N, C, H, W), sorted by class."""
    made = []
    for k in range(classes):
        flat = (x[y == k].float() / 255).flatten(1).cpu()
        mean = flat.mean(0)
        _, s, v = torch.linalg.svd(flat - mean, full_matrices=False)
        z = torch.randn(per_class, len(s)) * 0.35 * s / (len(flat) - 1) ** 0.5
        images = (mean + z @ v).clamp(0, 1).view(per_class, *x.shape[1:]).to(x.device)
        labels, nu = torch.full((per_class,), k, device=x.device), torch.zeros_like(images)
        for _ in range(steps):
            images = images.detach().requires_grad_(True)
            ebm_at.energy_xy(model(images), labels).sum().backward()
            g = images.grad / images.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            nu = 0.8 * nu - 0.3 * g
            images = (images + nu + 0.001 * torch.randn_like(images)).clamp(0, 1)
        made.append(images.detach())
    return torch.cat(made)


def ours(model, x, y, classes, per_class, dtype, **options):
    """The same number of images by ebm_at.generate, the fit of the PCA included."""
    pca = ebm_at.ClassPCA.fit(x, y, classes)
    energies = ebm_at.class_energies(model, x, y, classes, dtype=dtype)
    labels = torch.arange(classes, device=x.device).repeat_interleave(per_class)
    return ebm_at.generate(model, pca, labels, energies, dtype=dtype, **options)[0]


def timed(function, *arguments, **options):
    began = time.perf_counter()
    made = function(*arguments, **options)
    if made.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, made


def growth(device, dtype):
    """Rows (what, value, seconds to fit, seconds for starts, seconds per 1,000 image steps)."""
    usual = dict(images=1000, classes=10, size=32)
    sweeps = dict(images=(100, 1000, 10_000), classes=(10, 30, 100), size=(28, 32, 64))
    for what, values in sweeps.items():
        for value in values:
            at = usual | {what: value}
            n, classes, size = at.values()
            y = torch.arange(5000, device=device) % classes
            x = torch.randint(0, 256, (5000, 3, size, size), dtype=torch.uint8, device=device)
            model = ebm_at.make_model("small", classes).to(device).eval()
            fit, pca = timed(lambda: ebm_at.ClassPCA.fit(x, y, classes).mean)  # waits for a GPU
            pca = ebm_at.ClassPCA.fit(x, y, classes)
            labels = torch.arange(n, device=device) % classes
            start, x0 = timed(ebm_at.draw_starts, pca, labels)
            targets = torch.full((n,), -torch.inf, device=device)
            walk, _ = timed(
                lambda: ebm_at.sgld(model, x0, labels, targets, steps=2, dtype=dtype)[0]
            )
            yield what, value, fit, start, walk / 3 / n * 1000  # 3 gradients: the last only stops


def main(
    checkpoint: str,
    judge: str,
    per_class: Annotated[int, typer.Option(help="images per class")] = 100,
    steps: Annotated[int, typer.Option(help="of the plain loop")] = 60,
    rounds: Annotated[int, typer.Option(help="timings of each")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="of ours: auto, bf16 or fp32")] = "auto",
):
    """See the top of this file."""
    device, console = ebm_at.pick_device(device), Console(highlight=False)
    dtype = ebm_at.pick_precision(precision, device)
    model, loaded = ebm_at.load_model(cli.find_checkpoint(checkpoint), device)
    _, data = cli.data_of(loaded)
    network, _ = ebm_at.load_model(Path(judge, "last.pt"), device)
    x, y, classes = data.x_train.to(device), data.y_train.to(device), len(data.classes)
    real, p = ebm_at.judge_images(network, data.x_test.to(device))
    agreement = ebm_at.class_agreement(p, data.y_test.to(device))
    words = f"{cli.device_name(device)}, {torch.get_num_threads()} threads, ours in {dtype}"
    console.print(f"{checkpoint} on {data.name}; {words}; judge {agreement:.1%} on test images")
    n, ratios = classes * per_class, []
    for i in range(rounds):
        theirs, a = timed(plain, model, x, y, classes, per_class, steps)
        own, b = timed(ours, model, x, y, classes, per_class, dtype, seed=i)
        ratios.append(theirs / own)
        fd = [ebm_at.frechet_distance(ebm_at.judge_images(network, cli.to_uint8(t))[0], real)
              for t in (a, b)]  # fmt: skip
        console.print(f"round {i + 1}: plain {n / theirs:.1f} images/s, FD {fd[0]:.2f};  ours"
                      f" {n / own:.1f} images/s, FD {fd[1]:.2f};  {ratios[-1]:.1f} times as fast")  # fmt: skip
    console.print(f"median of {rounds}: ours is {statistics.median(ratios):.1f} times as fast")
    table = Table("what", "value", "PCA fit (s)", "starts (s)", "s per 1000 images and step")
    for what, value, *seconds in growth(device, dtype):
        table.add_row(what, str(value), *[f"{s:.3f}" for s in seconds])
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
