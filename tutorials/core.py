"""Adversarial training seen through energies, in one short file: python tutorials/core.py [SEED]

Trains a small network twice with one-step (FGSM) adversarial training, without and with the Delta
Energy Regularizer, and prints what happens; then makes images with the second one (core.png).
ebm_at.py has the reasons and the rivals. (Minutes on a CPU core; EBM_AT_SHORT=1: seconds.)
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ebm_at import import_torchvision, make_model, make_shapes  # noqa: E402

EPS, BATCH, LR = 20 / 255, 64, 0.2
BETA, RAMP = 1.5, 0.7  # weight of DER, and the share of training over which it grows to that
SHORT = os.environ.get("EBM_AT_SHORT") == "1"
EPOCHS, IMAGES, MEASURED = (2, 256, 50) if SHORT else (20, 5000, 200)


def as_floats(x):
    return (x.float() / 255).contiguous(memory_format=torch.channels_last)


# 1. Two energies. Low: the model finds it likely. Cross-entropy = E(x, y) - E(x), exactly.
def energy_xy(logits, y):
    return -logits.gather(1, y[:, None])[:, 0]


def energy_x(logits):
    return -logits.logsumexp(1)


def cross_entropy(logits, y):
    return energy_xy(logits, y) - energy_x(logits)


# 2. An attack climbs cross-entropy within EPS of x. FGSM: one step of EPS. PGD: many small ones.
def gradient(model, x, y, loss):
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(loss(model(x), y).sum(), x)[0]


def attack(model, x, y, eps, steps, step_size):
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv + step_size * gradient(model, x_adv, y, cross_entropy).sign()
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv


# 3. DER, the paper's equation (7) with gamma 0: how far the attack moved both energies. In abnormal
#    examples it LOWERED the loss: the landscape is bent between. DER puts a price on both moves.
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


# 5. A collapse shows in PGD accuracy, and often in the share of abnormal examples.
def measure(model, x, y):
    model.eval()
    attacked = (attack(model, x, y, EPS, *s) for s in ((0, 0), (1, EPS), (10, EPS / 4)))
    logits, one, ten = (model(x_adv).detach() for x_adv in attacked)
    clean, fgsm, pgd = ((f.argmax(1) == y).float().mean().item() for f in (logits, one, ten))
    return clean, fgsm, pgd, share_abnormal(logits, one, y)


# 6. Generate: start at a mixture of neighbouring real images (in their class's PCA), walk down
#    E(x, y), and stop at the energy that a real image has. Going on makes caricatures.
def generate(model, x, y, label, n, steps=60):
    own = as_floats(x[y == label][:500])
    flat, labels = own.flatten(1), torch.full((len(own),), label)
    _, _, v = torch.pca_lowrank(flat, min(20, len(own)))
    codes = (flat - flat.mean(0)) @ v
    near = torch.cdist(codes[torch.randint(len(own), (n,))], codes).topk(10, largest=False).indices
    shares = F.normalize(-torch.rand(n, 1, 10).log(), p=1, dim=2)  # positive, their sum is 1
    z = (shares @ codes[near])[:, 0]
    image = (flat.mean(0) + z @ v.T).view(n, *own.shape[1:]).clamp(0, 1)
    target = energy_xy(model(own), labels).detach()[torch.randint(len(own), (n,))]
    for _ in range(steps):
        walks = energy_xy(model(image), labels[:n]).detach() > target
        g = gradient(model, image, labels[:n], energy_xy)
        step = 0.3 * F.normalize(g.flatten(1)).view_as(g) * walks.view(-1, 1, 1, 1)
        image = (image - step).clamp(0, 1)
    return image


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    torch.set_num_threads(1)  # two threads on so small a network mostly wait for each other
    (x_train, y_train), (x_test, y_test) = make_shapes(IMAGES, 0), make_shapes(MEASURED, 1_000_003)
    for name, use_der in (("FGSM", False), ("FGSM + DER", True)):
        model = make_model(width=8)
        for epoch in train(model, x_train, y_train, use_der):
            clean, fgsm, pgd, abnormal = measure(model, as_floats(x_test), y_test)
            print(f"{name:10} epoch {epoch:2}: clean {clean:4.0%}, FGSM {fgsm:4.0%},"
                  f" PGD-10 {pgd:4.0%}, abnormal {abnormal:4.0%}", flush=True)  # fmt: skip
    import_torchvision()
    from torchvision.utils import save_image

    save_image(torch.cat([generate(model, x_train, y_train, k, 8) for k in range(10)]), "core.png")
