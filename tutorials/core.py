"""Adversarial training seen through energies, in a hundred lines: python tutorials/core.py

Trains the same small network twice with one-step (FGSM) adversarial training, without and with the
Delta Energy Regularizer, and prints what happens; then makes images with the second one. ebm_at.py
has all of this with its reasons, its rivals and its measurements. (About five minutes on a CPU.)
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ebm_at import import_torchvision, make_model, make_shapes  # noqa: E402

EPS, EPOCHS, BATCH, LR = 20 / 255, 20, 64, 0.2
BETA, RAMP = 1.5, 0.7  # weight of DER, and the share of training over which it grows to that


def as_floats(x):
    return (x.float() / 255).contiguous(memory_format=torch.channels_last)


# 1. Two energies. Low: the model finds it likely. cross-entropy = E(x, y) - E(x), exactly.
def energy_xy(logits, y):
    return -logits.gather(1, y[:, None])[:, 0]


def energy_x(logits):
    return -logits.logsumexp(1)


def cross_entropy(logits, y):
    return energy_xy(logits, y) - energy_x(logits)


# 2. An attack climbs cross-entropy within EPS of x. FGSM: one step of EPS. PGD: many small ones.
def gradient(model, x, y, objective):
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(objective(model(x), y).sum(), x)[0]


def attack(model, x, y, eps, steps, step):
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv + step * gradient(model, x_adv, y, cross_entropy).sign()
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv


# 3. DER: how far the attack moved both energies. Abnormal: the attack LOWERED the loss.
def der(logits, logits_adv, y):
    moved = energy_x(logits) - energy_x(logits_adv), energy_xy(logits, y) - energy_xy(logits_adv, y)
    return torch.stack(moved).norm(dim=0).mean()


def share_abnormal(logits, logits_adv, y):
    return (cross_entropy(logits_adv, y) < cross_entropy(logits, y)).float().mean().item()


# 4. Train at the attacked images.
def train(model, x_train, y_train, use_der):
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9, weight_decay=5e-4)
    steps = len(x_train) // BATCH
    for epoch in range(EPOCHS):
        model.train()
        for i, rows in enumerate(torch.randperm(len(x_train)).split(BATCH)[:steps]):
            progress = (epoch + i / steps) / EPOCHS
            optimizer.param_groups[0]["lr"] = LR * min(progress / 0.4, (1 - progress) / 0.6)
            eps = EPS * min(1, progress * EPOCHS / 3)  # grows over three epochs
            x, y = as_floats(x_train[rows]), y_train[rows]
            x_adv = attack(model, x, y, eps, 1, eps)
            logits_adv = model(x_adv)
            loss = F.cross_entropy(logits_adv, y)
            if use_der:
                loss = loss + BETA * min(1, progress / RAMP) * der(model(x), logits_adv, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield epoch + 1


# 5. A collapse shows in PGD accuracy, and in the share of abnormal examples.
def measure(model, x, y):
    model.eval()
    logits, one, ten = (
        model(attack(model, x, y, EPS, *s)).detach() for s in ((0, 0), (1, EPS), (10, EPS / 4))
    )
    clean, fgsm, pgd = ((f.argmax(1) == y).float().mean().item() for f in (logits, one, ten))
    return clean, fgsm, pgd, share_abnormal(logits, one, y)


# 6. Generate: start near a real image's place in its class's PCA, walk down E(x, y), and stop at
#    the energy that a real image has. Going on makes caricatures.
def generate(model, x, y, label, n, steps=60):
    own = as_floats(x[y == label][:500])
    flat, shape = own.flatten(1), own.shape[1:]
    _, _, v = torch.pca_lowrank(flat, 50)
    mean = flat.mean(0)
    codes = (flat - mean) @ v
    anchors = codes[torch.randint(len(codes), (n,))]
    around = codes[torch.cdist(anchors, codes).topk(10, largest=False).indices]  # (n, 10, 50)
    centre = around.mean(1, keepdim=True)
    z = centre + (1.5 / 9) ** 0.5 * torch.randn(n, 1, 10) @ (around - centre)
    image = (mean + z[:, 0] @ v.T).view(n, *shape).clamp(0, 1)
    labels, speed = torch.full((n,), label), torch.zeros(n, *shape)
    real = energy_xy(model(own), torch.full((len(own),), label)).detach()
    target = real[torch.randint(len(own), (n,))]
    for _ in range(steps):
        walks = energy_xy(model(image), labels).detach() > target
        g = gradient(model, image, labels, energy_xy)
        speed = 0.8 * speed - 0.3 * g / g.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        image = torch.where(walks.view(-1, 1, 1, 1), (image + speed).clamp(0, 1), image)
    return image


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # two threads on so small a network mostly wait for each other
    (x_train, y_train), (x_test, y_test) = make_shapes(5000, 0), make_shapes(400, 1_000_003)
    for use_der in (False, True):
        model = make_model()
        for epoch in train(model, x_train, y_train, use_der):
            clean, fgsm, pgd, abnormal = measure(model, as_floats(x_test), y_test)
            print(f"{'FGSM + DER' if use_der else 'FGSM':10} epoch {epoch:2}: clean {clean:4.0%}, FGSM {fgsm:4.0%},"
                  f" PGD-10 {pgd:4.0%}, abnormal {abnormal:4.0%}", flush=True)  # fmt: skip
    import_torchvision()
    from torchvision.utils import save_image

    pictures = [generate(model, x_train, y_train, k, 8) for k in range(10)]
    save_image(torch.cat(pictures), "generated.png", nrow=8)
