"""How long does one step of adversarial training take here, against the usual way of writing it?

Plain is as published single-file code has it: fp32 and NCHW, PIL images through torchvision and a
DataLoader, an attack by loss.backward() (which computes weight gradients only to throw them away),
.item() at every step. Ours is Trainer.step. Both first take one step on the same images, which must
agree; then they are timed in turn, and each pair of steps gives one ratio ours / plain.

    [EBM_AT_CIFAR10=cifar10.npz] python tutorials/results/bench_train.py [--method pgd] ...
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ebm_at  # noqa: E402

EPS = 8 / 255
ATTACK = {"fgsm": (1, EPS), "pgd": (10, EPS / 4)}  # number of steps, length of a step
SGD = dict(lr=0.1, momentum=0.9, weight_decay=5e-4)


def plain_batches(images, labels, size):
    """Augmented batches of uint8 images (N, 32, 32, 3), epoch after epoch without end."""
    T = ebm_at.import_torchvision().transforms
    augment = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor()])

    def read(rows):
        pictures = [augment(Image.fromarray(images[i])) for i in rows]
        return torch.stack(pictures), torch.from_numpy(labels[rows])

    while True:
        yield from torch.utils.data.DataLoader(range(len(labels)), size, shuffle=True,
                                               drop_last=True, collate_fn=read)  # fmt: skip


def plain_step(model, optimizer, x, y, delta, steps, step_size):
    """One step on x (N, C, H, W) in [0, 1] and y (N,), the attack from x + delta; -> the loss."""
    delta = torch.clamp(x + delta, 0, 1) - x
    for _ in range(steps):
        delta.requires_grad_(True)
        F.cross_entropy(model(x + delta), y).backward()
        with torch.no_grad():
            delta = torch.clamp(delta + step_size * delta.grad.sign(), -EPS, EPS)
            delta = torch.clamp(x + delta, 0, 1) - x
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x + delta), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def make_sides(images, labels, **more):
    """The same fresh network twice: (plain model, its optimizer, our Trainer)."""
    config = ebm_at.recipe("cifar10", eps=EPS, attack_bn="train", schedule="constant", **SGD | more)
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    data = ebm_at.Data(x, y, x[:10], y[:10], x[:10], y[:10], list("0123456789"), "benchmark")
    plain, trainer = ebm_at.build_model(config, data), ebm_at.Trainer(config, data)
    plain.to(trainer.device, memory_format=torch.contiguous_format)
    return plain, torch.optim.SGD(plain.parameters(), **SGD), trainer


def check_same(images, labels, method, **settings):
    """Both take a step on 8 images. In float64: fp32's rounding flips small gradients' signs."""
    settings |= dict(method=method, batch_size=8, augment="none", precision="fp32")
    plain, optimizer, trainer = make_sides(images[:8], labels[:8], **settings)
    for net in (plain, trainer.model):
        net.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    x, y = trainer.data.x_train.float() / 255, trainer.data.y_train
    draw = [torch.Generator(x.device).manual_seed(1) for _ in range(2)]  # both draw the same noise
    delta = ebm_at.random_noise(x, EPS, generator=draw[0]) * (method == "pgd")
    plain_step(plain, optimizer, x.contiguous(), y, delta, *ATTACK[method])
    trainer.step(torch.arange(8, device=x.device), draw[1], 0.0)
    for theirs, ours in zip(plain.parameters(), trainer.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def main(model: str = "small", method: str = "fgsm", precision: str = "auto", pairs: int = 40):
    images = np.random.default_rng(0).integers(0, 256, (5000, 32, 32, 3), np.uint8)
    labels = np.arange(5000) % 10
    if path := os.environ.get("EBM_AT_CIFAR10"):  # without: noise, which takes as long
        images, labels = np.load(path)["train_images"], np.load(path)["train_labels"].flatten()
    settings, labels = dict(model=model, method=method), labels.astype("int64")
    check_same(images, labels, **settings)
    plain, optimizer, trainer = make_sides(images, labels, precision=precision, **settings)
    batches, times = plain_batches(images, labels, 128), []
    for _ in range(pairs + 1):
        began = time.perf_counter()
        x, y = (t.to(trainer.device) for t in next(batches))
        delta = (torch.rand_like(x) * 2 - 1) * EPS * (method == "pgd")
        plain_step(plain, optimizer, x, y, delta, *ATTACK[method])
        middle = time.perf_counter()
        rows = torch.randint(len(labels), (128,)).to(trainer.device)
        trainer.step(rows, torch.Generator(trainer.device), 0.0).tolist()  # waits for a GPU
        times.append((middle - began, time.perf_counter() - middle))
    (theirs, ours), ratios = np.median(times[1:], 0), [b / a for a, b in times[1:]]
    print(f"{model}, {method}, batch 128, {trainer.device}, {torch.get_num_threads()} threads:"
          f" plain {theirs:.4f} s per step in float32, ours {ours:.4f} s in {trainer.dtype}\n"
          f"ours / plain: median {np.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    typer.run(main)
