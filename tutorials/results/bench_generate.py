"""How many images per second does `generate` make, against the usual way of writing it?

The same model and the same number of images of each class. Plain: one class at a time, a full PCA
by SVD of its training images at every call, class mean + .35 std along every component, a fixed
number of steps, the gradient by loss.backward() (weight gradients and all). Ours: the PCA fitted
once (its time is counted), local starts, adaptive stopping. Timed in turn; speed is no merit at
worse quality, so Frechet distances of both are measured by an ordinary classifier.

    python tutorials/results/bench_generate.py ROBUST_RUN/best.pt JUDGE_RUN/last.pt

JUDGE_RUN: of `cli.py train --method none` on the same data.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ebm_at  # noqa: E402


def plain(model, x, y, classes, per_class, steps=60):
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


def ours(model, x, y, classes, per_class):
    """The same by ebm_at.generate, the fit of the PCA included."""
    pcas = [ebm_at.fit_pca(x[y == k]) for k in range(classes)]
    energies = ebm_at.class_energies(model, x, y, classes)
    labels = torch.arange(classes, device=x.device).repeat_interleave(per_class)
    return ebm_at.generate(model, pcas, energies, labels)[0]


def timed(function, *arguments):
    began = time.perf_counter()
    made = function(*arguments)
    made.sum().item()  # waits for a GPU
    return time.perf_counter() - began, made


def main(checkpoint: str, judge: str, per_class: int = 100, rounds: int = 3, device: str = "auto"):
    device = ebm_at.pick_device(device)
    (model, saved), (network, _) = (ebm_at.load_model(p, device) for p in (checkpoint, judge))
    given = {k: saved["config"][k] for k in ("data_dir", "limit", "val_fraction", "seed")}
    data = ebm_at.load_data(saved["config"]["dataset"], **given)
    x, y, classes = data.x_train.to(device), data.y_train.to(device), len(data.classes)
    real, p = ebm_at.judge_images(network, data.x_test.to(device))
    agreement, times = ebm_at.class_agreement(p, data.y_test.to(device)), []
    print(f"{data.name}, {device}, {torch.get_num_threads()} threads; judge {agreement:.1%} right")
    for i in range(rounds):
        told = []
        for name, function in (("plain", plain), ("ours", ours)):
            seconds, made = timed(function, model, x, y, classes, per_class)
            features, _ = ebm_at.judge_images(network, (made * 255).round().to(torch.uint8))
            distance = ebm_at.frechet_distance(features, real)
            told.append(f"{name} {len(made) / seconds:.1f} images/s, FD {distance:.2f}")
            times.append(seconds)
        print(f"round {i + 1}: {'; '.join(told)}")
    speed = statistics.median(a / b for a, b in zip(times[::2], times[1::2]))
    seconds, _ = timed(ebm_at.draw_starts, ebm_at.fit_pca(x[y == 0]), 10_000)
    print(f"median: ours is {speed:.1f} times as fast; 10,000 starts take {seconds:.2f} s")


if __name__ == "__main__":
    typer.run(main)
