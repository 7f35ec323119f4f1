"""Adversarial training seen through energies: the whole idea in one file, to be read from the top.

A classifier with logits f(x) is also an energy-based model. Write E(x, y) = -f(x)[y] for the
energy of an image together with a label and E(x) = -log sum_k exp f(x)[k] for that of the image
alone: low energy means "the model finds this likely". The loss everybody trains with is a
difference of the two, cross-entropy(x, y) = E(x, y) - E(x), so an attack that raises the loss must
raise E(x, y), lower E(x), or both. Adversarial training minimises the loss at x*, the worst point
an attack finds within eps of x: FGSM in ONE gradient step (single-step, cheap), PGD in several
(multi-step, stronger). How far the attack moves the energies are the DELTA ENERGIES,
dE(x) = E(x) - E(x*) and dE(x, y) = E(x, y) - E(x*, y), in nats (their logarithms are natural ones).

Two things go wrong. Single-step training may lose all accuracy under PGD (catastrophic overfitting,
CO): the landscape bends until many x* have a LOWER loss than x (abnormal adversarial examples,
AAEs). Multi-step training overfits slowly (robust overfitting, RO): its robustness decays on new
images while it rises on those of training. The Delta Energy Regularizer (DER) adds beta * mean
sqrt(dE(x)^2 + dE(x, y)^2), less a margin, to the loss: an attack shall move energies little.

Part one tells this in order: 1 energies, 2 attacks, 3 losses and DER, 4 overfitting, 5 the training
loop, 6 generation. Part two is there to look things up in.

    symbol     in the code       shape         meaning
    x          x                 (N, C, H, W)  images, float in [0, 1]; the model normalises
    y          y                 (N,)          labels, int64 in [0, K)
    x*         x_adv             (N, C, H, W)  adversarial twin of x, at most eps away
    f(x)       logits            (N, K)        what the network puts out, before any softmax
    p(y|x)     softmax(logits)   (N, K)        class probabilities
    E(x, y)    energy_xy         (N,)          joint energy
    E(x)       energy_x          (N,)          marginal energy
    dE(x)      delta_energy      (N,)          E(x) - E(x*); > 0: the attack LOWERED E
    dE         delta_energy_norm (N,)          sqrt(dE(x)^2 + dE(x, y)^2): how far both moved
    eps        eps               float         size of the attack's ball, in units of [0, 1] pixels

Paper: "Understanding Adversarial Training with Energy-based Models", Mirza et al. 2025, arXiv
2505.22486. Predecessor: "Shedding More Light on Robust Classifiers under the lens of Energy-based
Models", Mirza et al., ECCV 2024, arXiv 2407.06315. Where we differ: DER is the paper's equation (7)
as a public reimplementation gives it; that on shapes it presses all images, that beta grows, its
size and the alarm's thresholds were measured here; how section 6 works in detail is our reading.
"""

import contextlib
import copy
import dataclasses
import difflib
import math
import os
import re
import time
import typing
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ==== 1. Energies =================================================================================
#
# Energies stand for densities: p(x, y) = exp(-E(x, y)) / Z and p(x) = exp(-E(x)) / Z, with one Z
# that makes them sum to 1. Nobody can compute Z, and nobody has to: it cancels in p(y|x) =
# p(x, y) / p(x), which is the softmax, and in every difference of energies.


def energy_xy(logits, y):
    """(E1) Joint energy E(x, y) = -f(x)[y]. logits (N, K), y (N,) -> (N,). Lower: likelier."""
    return -logits.float().gather(1, y[:, None]).squeeze(1)


def energy_x(logits):
    """(E2) Marginal energy E(x) = -log sum_k exp f(x)[k]. logits (N, K) -> (N,). Lower: likelier.

    exp(-E(x)) is the sum of exp(-E(x, y)) over y: the label is summed out, as in any joint density.
    Source: Grathwohl et al. 2020 (the joint energy-based model, JEM).
    """
    return -logits.float().logsumexp(1)


def cross_entropy(logits, y):
    """(E3) -log p(y|x) = -f(x)[y] + log sum_k exp f(x)[k] = E(x, y) - E(x), exactly. -> (N,)."""
    return F.cross_entropy(logits.float(), y, reduction="none")


def delta_energy(logits, logits_adv, y=None):
    """(E4) dE(x) = E(x) - E(x*); (E5) with labels, dE(x, y) = E(x, y) - E(x*, y).

    Args: logits and logits_adv (N, K), of the images and of their adversarial twins; y int64 (N,).
    Returns: (N,). Positive: the attack LOWERED the energy, x* looks likelier to the model than x.
    Source: Mirza et al. 2024, section 3; Mirza et al. 2025.
    """
    if y is None:
        return energy_x(logits) - energy_x(logits_adv)
    return energy_xy(logits, y) - energy_xy(logits_adv, y)


def delta_energy_norm(logits, logits_adv, y):
    """(E6) dE(x, x*, y) = sqrt(dE(x)^2 + dE(x, y)^2): how far an attack moves BOTH energies. (N,).

    Why both: softmax ignores a number c(x) added to all logits of an image, so a network can set
    E(x), and with it dE(x) alone, to anything without predicting otherwise. Together they bound
    what it predicts: the attack changes the cross-entropy by dE(x) - dE(x, y), and
    |a - b| <= sqrt(2) sqrt(a^2 + b^2), so |CE(x*) - CE(x)| <= sqrt(2) dE(x, x*, y).

    Args as for delta_energy. Where both are 0 the root has no slope; its gradient is then 0.
    Source: equation (7) of Mirza et al. 2025, as a public reimplementation gives it.
    """
    both = torch.stack([delta_energy(logits, logits_adv), delta_energy(logits, logits_adv, y)])
    return both.norm(dim=0)  # torch gives the norm of zeros a zero gradient, sqrt would give NaN


def abnormal(logits, logits_adv, y):
    """Which x* are abnormal adversarial examples (AAEs): the attack LOWERED their loss. (N,) bool.

    CE(x*) < CE(x) is E(x*, y) - E(x*) < E(x, y) - E(x), that is dE(x, y) > dE(x): the attack made
    the image with its label likelier by more than it made the image likelier. A step uphill that
    leads down has met a landscape bent within the ball, as catastrophic overfitting bends it.
    Source: Lin, Yu & Liu 2023 (AAER).
    """
    return delta_energy(logits, logits_adv, y) > delta_energy(logits, logits_adv)


# ==== 2. Attacks ==================================================================================
#
# An attack looks for x*, in the ball of radius eps around x, that makes a `loss` large. The loss is
# any function (logits, y) -> (N,): cross_entropy unless said. To REACH a label t instead of leaving
# y, climb `lambda logits, y: -cross_entropy(logits, t)`. No attack changes the model.


def gradient_of(model, x, y, loss):
    """The loss of each image (N,), its gradient in the images (N, C, H, W), the logits (N, K)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        value = loss(logits, y)
        # With respect to x alone: nothing is computed for the weights, no .grad is touched.
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient, logits.detach()


def ascend(x_adv, gradient, step, norm="linf"):
    """The steepest step of length `step`: along the sign for l_inf, along the gradient for l_2."""
    unit = gradient.sign() if norm == "linf" else F.normalize(gradient.flatten(1), eps=1e-20)
    return x_adv + step * unit.view_as(gradient).nan_to_num(0)  # where it is NaN: no step


def project(x_adv, x, eps, norm="linf"):
    """The nearest point to x_adv within eps of x, then within [0, 1]."""
    delta = x_adv - x
    delta = delta.clamp(-eps, eps) if norm == "linf" else delta.renorm(2, 0, eps)
    return (x + delta).clamp(0, 1)


def random_noise(x, eps, norm="linf", generator=None):
    """A uniform draw from the eps-ball around 0 for every image of x, shaped like x."""
    draw = dict(generator=generator, device=x.device)
    if norm == "linf":
        return (torch.rand(x.shape, **draw) * 2 - 1).to(x.dtype) * eps
    direction = F.normalize(torch.randn(x.shape, **draw).flatten(1))
    radius = eps * torch.rand(len(x), 1, **draw) ** (1 / direction.shape[1])  # uniform in volume
    return (radius * direction).view_as(x).to(x.dtype)


@torch.no_grad()
def fgsm(model, x, y, eps, *, norm="linf", loss=cross_entropy, start=None, step=None,
         inside_ball=True, batchnorm="eval", generator=None):  # fmt: skip
    """(E7) Fast gradient sign method: x* = clip(x + eps * sign grad_x CE(x, y)); l_2: see ascend.

    Args:
        model: an nn.Module, images in [0, 1] -> logits (N, K). Left exactly as it was.
        x, y: images float (N, C, H, W) in [0, 1]; labels int64 (N,).
        eps: radius of the ball, in pixel units; 0 returns x.
        norm, loss: "linf" or "l2"; what to climb, see above.
        start, step: where the gradient is taken, if not at x; length of the step, if not eps.
        inside_ball: False leaves x* outside the ball where start + step led there.
        batchnorm: "eval", or "train": a model in train mode stays in it (see attack_mode).
        generator: not used; it is here so that all attacks are called alike.
    Returns: x_adv, like x, detached. Raises: BadInput. Source: Goodfellow et al. 2015.
    """
    check_attack(x, y, eps, norm)
    start = x if start is None else start
    with attack_mode(model, batchnorm):
        _, gradient, _ = gradient_of(model, start, y, loss)
    x_adv = ascend(start, gradient, eps if step is None else step, norm)
    return project(x_adv, x, eps, norm) if inside_ball else x_adv.clamp(0, 1)


def rs_fgsm(model, x, y, eps, *, norm="linf", generator=None, **options):
    """(E8) FGSM from x + U(-eps, eps), with one step of 1.25 eps, back into the ball.

    `generator` draws the start; options: as for fgsm. Source: Wong et al. 2020.
    """
    start = (x + random_noise(x, eps, norm, generator)).clamp(0, 1)
    return fgsm(model, x, y, eps, norm=norm, start=start, step=1.25 * eps, **options)


def n_fgsm(model, x, y, eps, *, norm="linf", generator=None, **options):
    """(E9) Noisy FGSM: x0 = x + U(-2 eps, 2 eps), one step of eps, and NO clipping to the ball.

    So x* may lie up to 3 eps away from x, but always in [0, 1]: it is meant for training, not for
    judging. Options as for fgsm. Source: de Jorge et al. 2022, algorithm 1.
    """
    start = (x + random_noise(x, 2 * eps, norm, generator)).clamp(0, 1)
    return fgsm(model, x, y, eps, norm=norm, start=start, inside_ball=False, **options)


@torch.no_grad()
def pgd(model, x, y, eps, steps=10, step_size=None, *, norm="linf", loss=cross_entropy, start=None,
        batchnorm="eval", generator=None):  # fmt: skip
    """(E10) Projected gradient descent: `steps` times x* <- project(x* + step_size * direction).

    Args: step_size, default eps / 4 (2/255 at 8/255, Rice et al. 2020); start, default a uniform
    draw from the ball by `generator`. The others as for fgsm.
    Returns: x_adv, like x, detached: the last iterate. Raises: BadInput. Source: Madry et al. 2018.
    """
    check_attack(x, y, eps, norm)
    step_size = eps / 4 if step_size is None else step_size
    x_adv = (x + random_noise(x, eps, norm, generator)).clamp(0, 1) if start is None else start
    with attack_mode(model, batchnorm):
        for _ in range(steps):
            _, gradient, _ = gradient_of(model, x_adv, y, loss)
            x_adv = project(ascend(x_adv, gradient, step_size, norm), x, eps, norm)
    return x_adv


# ==== 3. What training minimises: the losses and DER ==============================================


def adversarial_loss(logits, logits_adv, y, beta=None):
    """(E11) Mean cross-entropy at x*: what FGSM and PGD minimise. Source: Madry et al. 2018.

    `logits` and `beta` are not used; they are here so that all losses are called alike.
    """
    return cross_entropy(logits_adv, y).mean()


def der(logits, logits_adv, y, gamma=0.0, abnormal_only=False):
    """(E12) Delta Energy Regularizer: mean of max(0, dE(x, x*, y) - gamma). A scalar.

    Added to the loss of any method as beta * der. Gradients flow through all FOUR energies: x and
    x* are drawn together, it is not only x* that is pulled towards x.

    Why it helps. Under catastrophic overfitting the loss is bent between x and the one point where
    single-step training looks: that point is made safe, and points that a few PGD steps reach are
    not. Where x* is to have the energies of x, such a bend has a price. It is no ban: a bend fits
    between two points of equal energy (with the paper's beta .5 on AAEs, at its scale, training
    collapsed in epoch 20 instead of 12: tutorials/results/README.md).

    Args: gamma, change that is left alone, in nats; abnormal_only, mean over the AAEs only, as the
        paper does against collapse (0 where there are none). The others as for delta_energy.
    Source: equation (7) of Mirza et al. 2025, as a public reimplementation gives it.
    """
    excess = F.relu(delta_energy_norm(logits, logits_adv, y) - gamma)
    if not abnormal_only:
        return excess.mean()
    chosen = abnormal(logits, logits_adv, y)
    return (excess * chosen).sum() / chosen.sum().clamp_min(1)


def beta_at(config, progress):
    """Weight of DER at `progress` in [0, 1) of all epochs: from der_from on, grown over der_ramp.

    Why it grows: early on the network has to learn first (beta 2 from the start learns nothing on
    shapes). Against an early collapse there is eps_at, and for RS-FGSM a shorter ramp.
    """
    if not config.der or progress < config.der_from:
        return 0.0
    since = progress - config.der_from
    return config.beta * (min(1.0, since / config.der_ramp) if config.der_ramp else 1.0)


def training_attack(model, x, y, eps, config, generator=None):
    """x* as config.method makes it (METHODS, section 8; Config, section 13), like x, and the logits
    (N, K) at the attack's start, x or x and noise, from its first pass. Without an attack: x, None.
    """
    attack, seen = METHODS[config.method].attack, []
    if attack is None:
        return x, None
    options = dict(norm=config.norm, batchnorm=config.attack_bn, generator=generator)
    if attack not in SINGLE_STEP:
        options |= dict(steps=config.attack_steps, step_size=config.attack_step or None)
    with model.register_forward_hook(lambda _, given, out: seen.append((given[0], out.detach()))):
        x_adv = attack(model, x, y, eps, **options)
    start, logits = seen[0]
    if config.attack_bn == "eval":  # the loss has batch statistics: look again, with those
        with torch.no_grad(), attack_mode(model, "train"):
            logits = model(start)
    return x_adv, logits


def training_loss(model, x, y, x_adv, noise, beta, config):
    """Everything that is minimised: the method's loss and the regularizers that are switched on.

    Args: noise, GradAlign's (N, C, H, W); beta, the weight of DER now, 0 where it is off.
    Returns: the loss (scalar) and the logits of x_adv (N, K).
    """
    method = METHODS[config.method]
    logits = model(x) if method.needs_clean or beta else None
    logits_adv = model(x_adv)
    loss = method.loss(logits, logits_adv, y, config.method_beta)
    if beta:
        penalty = der(logits, logits_adv, y, config.gamma, config.der_on == "abnormal")
        if config.der_on == "abnormal":  # of several processes each counts by its share of AAEs
            penalty = penalty * process_weight(abnormal(logits, logits_adv, y))
        loss = loss + beta * penalty
    if config.grad_align:
        with attack_mode(model, "train", freeze=False):
            loss = loss + config.grad_align * grad_align(model, x, y, noise)
    return loss, logits_adv


# ==== 4. Overfitting: what is measured, and when the alarm rings ==================================


@torch.no_grad()
def evaluate(model, x, y, eps, steps=10, norm="linf", dtype=torch.float32, batch_size=500):
    """Accuracies and energies of a model on images, clean and under FGSM and PGD.

    Args: x (N, C, H, W), uint8 or float in [0, 1], and y; eps, steps, norm of the attacks (PGD: one
        random start, step eps / 4, the same noise at every call); dtype, of the convolutions: that
        of training while it runs, float32 (then without TF32) for what is reported at its end.
    Returns: dict of means: clean_acc, fgsm_acc, pgd_acc and fgsm_aae (share of AAEs under FGSM), in
        [0, 1]; energy, E(x); delta_energy_fgsm and delta_energy_pgd, dE(x); abs_delta_energy_pgd,
        |dE(x)|; delta_energy_xy_pgd, dE(x, y), in nats; and n, how many images.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    clean, single, multi = [], [], []
    with attack_mode(model), autocast(x.device, dtype), true_fp32():
        for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
            xb = as_pixels(xb)
            clean.append(model(xb))
            single.append(model(fgsm(model, xb, yb, eps, norm=norm)))
            multi.append(model(pgd(model, xb, yb, eps, steps, norm=norm, generator=generator)))
    clean, single, multi = (torch.cat(logits).float() for logits in (clean, single, multi))
    means = {
        "clean_acc": clean.argmax(1) == y, "fgsm_acc": single.argmax(1) == y,
        "pgd_acc": multi.argmax(1) == y, "fgsm_aae": abnormal(clean, single, y),
        "energy": energy_x(clean), "delta_energy_fgsm": delta_energy(clean, single),
        "delta_energy_pgd": delta_energy(clean, multi),
        "abs_delta_energy_pgd": delta_energy(clean, multi).abs(),
        "delta_energy_xy_pgd": delta_energy(clean, multi, y),
    }  # fmt: skip
    return {"n": len(x)} | {k: v.float().mean().item() for k, v in means.items()}


def catastrophic_overfitting(pgd_acc, single_step_acc, best_pgd_acc):
    """Has PGD accuracy collapsed while single-step accuracy holds? A sentence that says so, or "".

    Three numbers in [0, 1], of one epoch; the best so far includes this one. Neither the share of
    AAEs nor dE is asked: on the stored runs the accuracies rang in 2 of 194 that did not collapse
    and missed 5 of 57 that did, without such a gap (tutorials/results/alarms.py).
    """
    apart = single_step_acc - pgd_acc >= 0.12 and pgd_acc <= 0.35 * single_step_acc
    fallen = pgd_acc < 0.6 * best_pgd_acc
    # A run can collapse before PGD accuracy ever rose: then there is no best to fall from.
    never_rose = single_step_acc >= 0.5 and pgd_acc <= 0.1 * single_step_acc
    if not (apart and (fallen or never_rose)):
        return ""
    return (f"Catastrophic overfitting: PGD accuracy is {pgd_acc:.1%} (best {best_pgd_acc:.1%})"
            f" while single-step accuracy is {single_step_acc:.1%}")


def robust_overfitting(pgd_acc, train_acc, n, window=3):
    """Does PGD accuracy decay from its best while that on TRAINING images rises? A sentence, or "".

    Both accuracies: a list with a number per epoch; n: images behind each of pgd_acc. Means over
    `window` epochs are compared (one is noisy): a fall of 4 points and 1.5 standard errors, a rise
    of 5 points.
    """
    if len(pgd_acc) < window:
        return ""
    box = np.full(window, 1 / window)
    pgd_acc, train_acc = (np.convolve(v, box, "valid") for v in (pgd_acc, train_acc))
    peak = int(pgd_acc.argmax())
    best, then = pgd_acc[peak], train_acc[peak]
    limit = max(0.04, 1.5 * math.sqrt(best * (1 - best) / n))
    if best - pgd_acc[-1] < limit or train_acc[-1] - then < 0.05:
        return ""
    return (f"Robust overfitting: PGD accuracy on held-out images fell from {best:.1%},"
            f" {len(pgd_acc) - 1 - peak} epochs ago, to {pgd_acc[-1]:.1%} (alarm at"
            f" a fall of {100 * limit:.1f} points) while on attacked training images it rose from"
            f" {then:.1%} to {train_acc[-1]:.1%}")  # fmt: skip


# ==== 5. Training: one loop for every method ======================================================
#
# Why training against ONE step can collapse at all. The attack takes the slope of the loss at x and
# trusts that it holds for a whole eps. The network is rewarded for being right at the one point
# where that step lands, and bending the landscape between x and there is cheaper than becoming
# robust: the slope at x then points away from the danger, FGSM lands on harmless points (AAEs), and
# accuracy on them soars, while PGD, which looks again on its way, finds everything wrong. The loss
# looks at x* alone and cannot see this. DER sees x as well, and charges for every difference of
# energy between the two: an image that turns harmless only where FGSM steps has one.


def lr_at(config, progress):
    """Learning rate at `progress` in [0, 1) of the run; after a rescue, of what has come since."""
    if config.schedule == "triangular":  # 0 -> lr -> 0
        return config.lr * min(progress / config.lr_peak, (1 - progress) / (1 - config.lr_peak))
    if config.schedule == "piecewise":
        return config.lr * 0.1 ** sum(progress >= float(at) for at in config.lr_drops.split(","))
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


def eps_at(config, epochs_done):
    """Radius of the training attack after a (fractional) number of epochs: the linear warm-up.

    Why: with the full eps from the first step FGSM collapses on shapes with DER, too (seed 0: at
    epoch 6, .1% under PGD in the end); grown into over three epochs, in none of five seeds.
    """
    return config.eps * (min(1.0, epochs_done / config.eps_warmup) if config.eps_warmup else 1.0)


# Measured on the training attack, x* (with AWP at shifted weights) against its start.
TRACKED = ["train_adv_acc", "train_adv_aae", "train_adv_delta_energy", "train_adv_delta_energy_xy"]


class Trainer:
    """One run: `for record in Trainer(config, data).run()` trains and measures; see `train`."""

    def __init__(self, config, data, model=None, resume=None):
        check_config(config)
        self.config = dataclasses.replace(config)  # ours: a rescue adds epochs and DER
        self.device = pick_device(config.device)
        self.dtype = pick_precision(config.precision, self.device)
        self.data = data.to(self.device)
        model = (build_model(config, data) if model is None else model).to(self.device)
        if world()[1] > 1 and self.device.type == "cuda":  # on CPUs there is no such layer
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model
        self.net = torch.compile(model) if config.compile else model  # same weights, faster calls
        self.optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum,
                                         weight_decay=config.weight_decay)  # fmt: skip
        n, size = len(data.x_train), config.batch_size
        if size > n:
            raise BadInput(f"batch_size {size} exceeds the {n} training images")
        if size % world()[1]:
            raise BadInput(f"batch_size {size} is not divisible by {world()[1]} processes")
        self.steps = n // size  # per epoch; a last partial batch is left out
        self.epoch, self.history, self.alarms, self.stopped = 0, [], [], False
        self.restarted = 0  # the epoch from which learning rate and alarms count; see react
        weights = copy.deepcopy(model.state_dict())
        self.best = {"accuracy": -1.0, "epoch": 0, "weights": weights}  # on validation
        if resume:
            restore_run(self, resume["training"])

    def run(self, folder=None, on_progress=None):
        """Trains to the end; see `train` for what it yields.

        All randomness of an epoch follows from (seed, epoch): that is why a resumed run needs no
        random state to repeat an uninterrupted one bit for bit.
        """
        config, n, (rank, processes) = self.config, len(self.data.x_train), world()
        save_run(self, folder)  # anew: a kill may have come between last.pt and best.pt
        while self.epoch < config.epochs and not self.stopped:
            # Train: every image once, in a new order (drawn on the CPU: the same on every device).
            began, steps, seed = time.perf_counter(), [], config.seed * 100_003 + self.epoch
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            generator = torch.Generator(self.device).manual_seed(seed + 2**40 * rank)
            batches = order.to(self.device).split(config.batch_size)[: self.steps]
            self.model.train()
            for i, rows in enumerate(batches):
                epochs_done = self.epoch + i / self.steps
                steps.append(self.step(rows[rank::processes], generator, epochs_done))
                if on_progress:
                    on_progress(self.epoch, i + 1, self.steps)
            self.epoch += 1

            (steps,) = mean_over_processes([torch.stack(steps).double()])
            row = dict(zip(["train_loss", *TRACKED], steps.mean(0).tolist()))
            lr = self.optimizer.param_groups[0]["lr"]
            row |= {"epoch": self.epoch, "lr": lr, "seconds": time.perf_counter() - began}

            # Measure. What is not finite stops the run before a checkpoint could be overwritten.
            row |= self.measure()
            if not math.isfinite(row["train_loss"] + row["energy"]):
                cure = "the last good checkpoint is kept; try a lower lr or beta, or fp32"
                raise RunError(f"loss or weights became NaN in epoch {self.epoch}; {cure}")
            self.history.append({k: row.get(k) for k in HISTORY})

            # Judge, and keep the best epoch: by its accuracy on validation, never on test.
            alarm = self.react()
            accuracy = row["val_clean_acc" if config.method == "none" else "val_pgd_acc"]
            if not alarm and accuracy > self.best["accuracy"]:
                weights = copy.deepcopy(self.model.state_dict())
                self.best = {"accuracy": accuracy, "epoch": self.epoch, "weights": weights}
            save_run(self, folder)
            if alarm:
                yield alarm
            yield {"kind": "epoch", **self.history[-1]}
        self.model.eval()  # so that whoever uses it next neither sees nor moves batch statistics

    def step(self, rows, generator, epochs_done):
        """One step of SGD on the images `rows`, after a (fractional) number of epochs.

        Makes x*, steps down the loss there, and measures TRACKED on logits that both have made.
        Returns: the loss and the means of TRACKED, a tensor: reading it would stall a GPU.
        """
        config, eps = self.config, eps_at(self.config, epochs_done)
        self.beta = beta_at(config, epochs_done / config.epochs)
        x = as_pixels(augment(self.data.x_train[rows], config.augment, generator))
        y = self.data.y_train[rows]

        # The attack. BatchNorm sees the batch (attack_bn "train"), as in published training code:
        # on shapes FGSM then reaches 21 to 24% under PGD in each of five seeds before it collapses
        # (H100), with running statistics 3 to 20%.
        fast = partial(autocast, self.device, self.dtype)
        with fast():
            x_adv, logits = training_attack(self.net, x, y, eps, config, generator)
        noise = random_noise(x, eps, config.norm, generator) if config.grad_align else None

        def objective():
            """Loss and logits of x*, in an autocast of its own: it remembers the weights it has
            cast, and AWP moves them between two calls."""
            with fast():
                return training_loss(self.net, x, y, x_adv, noise, self.beta, config)

        # The descent: at shifted weights if AWP is on, at a rate that follows the schedule.
        self.optimizer.zero_grad()
        awp = config.awp if epochs_done >= config.awp_warmup else 0.0
        with adversarial_weights(self.model, lambda: objective()[0], awp):
            loss, logits_adv = objective()
            loss.backward()
        mean_over_processes([p.grad for p in self.model.parameters() if p.grad is not None])
        progress = (epochs_done - self.restarted) / (config.epochs - self.restarted)
        self.optimizer.param_groups[0]["lr"] = lr_at(config, progress)
        self.optimizer.step()
        with torch.no_grad():  # TRACKED, from logits that are there already
            ends = (logits_adv if logits is None else logits), logits_adv
            tracked = [logits_adv.argmax(1) == y, abnormal(*ends, y), delta_energy(*ends),
                       delta_energy(*ends, y)]  # fmt: skip
            return torch.stack([loss.detach(), *(t.float().mean() for t in tracked)])

    def measure(self):
        """The epoch's columns that are measured, at the run's full eps, on the same images always.

        The verdict rests on validation, which gets the most images (400: a standard error of 2
        points); test and train are only watched.
        """
        began, config, found = time.perf_counter(), self.config, {}
        for split, share in (("test", 2), ("val", 1), ("train", 4)):
            x, y = getattr(self.data, f"x_{split}"), getattr(self.data, f"y_{split}")
            rows = evenly(math.ceil(config.probe_size / share), len(y)).to(self.device)
            prefix = "" if split == "test" else f"{split}_"
            told = evaluate(self.model, x[rows], y[rows], config.eps, 10, config.norm, self.dtype)
            found |= {prefix + k: v for k, v in told.items()}
        found = of_first_process(found, self.device)  # all must decide alike
        return found | {"probe_seconds": time.perf_counter() - began}

    def diagnose(self):
        """(verdict, why) of the last epoch. The first that holds: not robust (not trained to be),
        CO, RO, at chance (no better than one answer for all), decayed (< 60% of the best), healthy.
        """
        config, last = self.config, self.history[-1]
        accuracy = f"PGD accuracy is {last['val_pgd_acc']:.1%}"
        if config.method == "none":
            return "not robust", f"Not trained for robustness: {accuracy}"
        y = self.data.y_val[evenly(config.probe_size, len(self.data.y_val)).to(self.device)]
        # Measured at full eps: until the attack has grown to it, low accuracy is no collapse.
        since = max(self.restarted + 1, config.eps_warmup)
        rows = [r for r in self.history if r["epoch"] >= since]
        pgd_acc, train_acc = ([r[k] for r in rows] for k in ("val_pgd_acc", "train_adv_acc"))
        best = max(pgd_acc, default=0.0)
        if rows:
            single = last["val_fgsm_acc"]
            if METHODS[config.method].attack in SINGLE_STEP and self.epoch > config.eps_warmup + 1:
                single = max(single, last["train_adv_acc"])  # FGSM in eval mode may not show it
            if why := catastrophic_overfitting(pgd_acc[-1], single, best):
                return "CO", why
            if why := robust_overfitting(pgd_acc, train_acc, len(y)):
                return "RO", why
        # One answer for all, the commonest class, holds whatever an attack does: no merit.
        if last["val_pgd_acc"] <= y.bincount().max().item() / len(y) + 1e-6:
            return "at chance", f"No better than one answer for all: {accuracy}"
        best = max(best, self.best["accuracy"])  # from before a rescue, too
        if last["val_pgd_acc"] < 0.6 * best:  # no overfitting: too much is asked of the network
            return "decayed", f"{accuracy} (best {best:.1%}): try a lower lr, or less DER (beta)"
        return "healthy", (
            f"Healthy: on held-out images {accuracy} (best {best:.1%}), FGSM"
            f" accuracy {last['val_fgsm_acc']:.1%}, delta energy under PGD"
            f" {last['val_delta_energy_pgd']:+.2f}"
        )

    def react(self):
        """Judges the last epoch; at the first alarm of a kind does on_overfit, and returns it."""
        verdict, why = self.diagnose()
        self.history[-1]["verdict"] = verdict
        action, had_der = self.config.on_overfit, self.beta > 0  # DER is on, not yet to come
        rung = [(a["verdict"], a["der"]) for a in self.alarms]  # each once without DER, once with
        if verdict not in ("CO", "RO") or (verdict, had_der) in rung:
            return None
        if action == "der" and had_der:
            action = "rollback"  # DER is on already and did not hold: keep the best there was
        if action in ("rollback", "der"):
            self.model.load_state_dict(self.best["weights"])
        if action == "der":
            # A whole run follows from the best epoch's weights; learning rate and momentum begin
            # anew. Beta does not, it goes by all epochs: from 0 again it was too little (measured).
            self.config.der, self.restarted = True, self.epoch
            self.config.der_from *= verdict == "RO"  # a late DER stays late; a collapse cannot wait
            self.config.epochs += self.epoch
            self.optimizer.state.clear()
        self.stopped = action in ("stop", "rollback")
        alarm = {"kind": "alarm", "verdict": verdict, "epoch": self.epoch, "reason": why}
        alarm |= {"action": action, "der": had_der, "back_to_epoch": self.best["epoch"]}
        self.alarms.append(alarm)
        return alarm

    def verdict(self):
        """What to say of the whole run: a verdict as in `diagnose`, and a sentence why."""
        for alarm in self.alarms:  # CO stays the verdict even where accuracy recovers; RO may pass
            ended = alarm["action"] in ("stop", "rollback")
            if ended or (alarm["verdict"] == "CO" and alarm["action"] == "continue"):
                return alarm["verdict"], f"Epoch {alarm['epoch']}: {alarm['reason']}"
        verdict, why = self.diagnose()
        rescues = [alarm["reason"] for alarm in self.alarms if alarm["action"] == "der"]
        return verdict, "".join(f"{r}. DER was added. " for r in rescues) + why


def train(config, data, model=None, *, folder=None, resume=None, on_progress=None):
    """Trains a model by config.method; a generator that yields plain records as it goes.

    Args: config, Config, best made by `recipe`; data, Data (see load_data); model, trained in
        place, default build_model(config, data); folder, an existing one for last.pt and best.pt,
        written after every epoch, or None; resume, what load_checkpoint read from a last.pt;
        on_progress, called as (epoch, step, steps per epoch) after every step.
    Yields: {"kind": "alarm", verdict, epoch, reason, action, back_to_epoch, der} when overfitting
        strikes, and {"kind": "epoch", ...}, the columns of HISTORY, after every epoch.
    Raises: BadInput; RunError when the loss diverges or a file cannot be written.
    """
    yield from Trainer(config, data, model, resume).run(folder, on_progress)


# ==== 6. Generation: class-wise local PCA, energy guidance, adaptive stopping =====================
#
# The gradients of a robust classifier look like the class: walking down E(x, y) paints class y into
# an image. Where the walk STARTS decides how varied the pictures are, where it STOPS how good: real
# images are not the points of lowest energy, they lie where E(x, y) has a certain value, and a walk
# that goes on beyond it ends in saturated caricatures. So: start near the data, in a model of each
# class with few dimensions, and stop as soon as the energy is that of real images.


@dataclass
class PCA:
    """(E13) Of ONE class: codes z = V (x - mu) of an image, and back, x = mu + V^T z.

    mean mu (D,); directions V (P, D), orthonormal rows; std (P,) and codes (n, P) of the images it
    was fitted to; shape [C, H, W] of an image, D = C H W.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    std: torch.Tensor
    codes: torch.Tensor
    shape: list

    def decode(self, z):
        """Images of codes, clipped to [0, 1]: (N, P) -> (N, C, H, W)."""
        return (self.mean + z @ self.directions).view(len(z), *self.shape).clamp(0, 1)


def fit_pca(x, components=50):
    """The PCA of the images of one class (n, C, H, W), uint8 or float in [0, 1].

    components: their number, or the share of variance to retain. At most 20,000 images are used,
    taken evenly: memory stays bounded. Raises: BadInput.
    """
    if not (0 < components < 1 or components in range(1, 1_000_000)):
        raise BadInput(f"components must be a whole number or a share below 1: {components}")
    flat = as_pixels(x[evenly(20_000, len(x)).to(x.device)]).flatten(1)
    mean = flat.mean(0)
    flat = flat - mean
    if components < 1:  # a share: all directions are needed to know what the first ones retain
        _, s, v = torch.linalg.svd(flat, full_matrices=False)
        components = int(((s**2).cumsum(0) / (s**2).sum() < components).sum()) + 1
    else:  # a few: a random subspace, turned towards the leading ones (Halko et al. 2011)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)
            _, s, v = torch.pca_lowrank(flat, min(int(components) + 10, *flat.shape), False, 6)
        v = v.T
    keep = min(int(components), int((s > 1e-4 * s[0]).sum()))  # what is left is rounding
    codes = flat @ v[:keep].T
    std = codes.square().sum(0).div(max(len(codes) - 1, 1)).sqrt()
    return PCA(mean, v[:keep].clone(), std, codes, list(x.shape[1:]))


def local_codes(pca, n, neighbours=10, temperature=1.5, generator=None):
    """(E14) z = m + sqrt(T / (k - 1)) sum_j g_j (z_j - m),  g_j ~ N(0, 1),  m = mean_j z_j.

    The z_j are the k codes nearest to that of an anchor, an image of the class drawn at random, so
    z is a draw from the Gaussian fitted to them: its covariance is T times theirs, without forming
    a matrix. A class is not one Gaussian cloud but a curved sheet; small patches of it are flat.
    The m lie closer together than the images do; T = 1.5 makes up for it (total variance of the
    codes over that of real ones: 1.06 on shapes, .91 on CIFAR-10; with T = 1 .85 and .78).

    Returns: codes (n, P). Raises: BadInput when the class has fewer than k images.
    """
    if not 2 <= neighbours <= len(pca.codes) or temperature < 0:
        raise BadInput(f"need 2 to {len(pca.codes)} neighbours (the class's images), temperature >="
                       f" 0, not {neighbours} and {temperature}")  # fmt: skip
    draw = dict(generator=generator, device=pca.codes.device)
    anchors = pca.codes[torch.randint(len(pca.codes), (n,), **draw)]
    around = pca.codes[torch.cdist(anchors, pca.codes).topk(neighbours, largest=False).indices]
    centre = around.mean(1, keepdim=True)  # around: (n, k, P)
    g = torch.randn(n, 1, neighbours, **draw) * math.sqrt(temperature / (neighbours - 1))
    return (centre + g @ (around - centre)).squeeze(1)


STARTS = ("local-pca", "gaussian", "pca", "mean", "noise")


def draw_starts(pca, n, init="local-pca", neighbours=10, temperature=1.5, generator=None):
    """(E15) Where n walks of pca's class begin: x0 = clip(mu + V^T z), or uniform noise.

    z by `init`, one of STARTS: local_codes for local-pca; s g for gaussian (s, std of real codes;
    g ~ N(0, 1)); .35 s g for pca, as in the predecessor; 0 for mean.
    Returns: images (n, C, H, W) in [0, 1]. Raises: BadInput.
    """
    check_choice("init", init, STARTS)
    draw = dict(generator=generator, device=pca.codes.device)
    if init == "noise":
        return torch.rand(n, *pca.shape, **draw)
    if init == "local-pca":
        return pca.decode(local_codes(pca, n, neighbours, temperature, generator))
    scale = {"mean": 0.0, "pca": 0.35, "gaussian": 1.0}[init]
    return pca.decode(scale * pca.std * torch.randn(n, len(pca.std), **draw))


def class_energies(model, x, y, num_classes, most=500):
    """E(x, y) of real images, class by class: a list of K tensors, each (at most `most`,)."""
    of_class = [x[y == k][:most] for k in range(num_classes)]
    if not all(map(len, of_class)):
        raise BadInput("a class has no images: its energies say when to stop")
    return [-exact_logits(model, part)[:, k] for k, part in enumerate(of_class)]


STOPS = ("sampled", "mean", "quantile", "fixed")


def stop_targets(energies, n, stop="sampled", quantile=0.5, generator=None):
    """(E16) The energies (n,) at which n walks end, from those of real images of the class (m,).

    mean: their mean. quantile: the value below which that share of them lies (small: likelier
    pictures, more steps). sampled: each walk gets one real image's, so that the pictures' energies
    are spread as real ones are (a mean cuts off the upper half). fixed: -inf; all steps are taken.
    """
    check_choice("stop", stop, STOPS)
    if not 0 <= quantile <= 1:
        raise BadInput(f"quantile must lie in 0 .. 1, not {quantile}")
    if stop == "sampled":
        draw = dict(generator=generator, device=energies.device)
        return energies[torch.randint(len(energies), (n,), **draw)]
    ends = {"mean": energies.mean(), "quantile": energies.quantile(quantile)}
    return ends.get(stop, torch.full_like(energies[0], -math.inf)).expand(n)


@torch.no_grad()
def sgld(model, x, y, targets, *, steps=60, step_size=0.3, momentum=0.8, noise=0.001,
         guide=energy_xy, batch_size=500, generator=None, on_progress=None):  # fmt: skip
    """(E17) Walks down the energy: nu <- zeta nu - eta g / |g|;  x <- clip(x + nu + noise N(0, 1)).

    The form is that of stochastic gradient Langevin dynamics, hence the name; but with momentum,
    unit-length gradients and a noise that does not follow the step it does NOT sample p(x, y): it
    descends, with a little noise, and the stop decides where it ends.

    Adaptive stopping: an image whose E(x, y) <= its target stops and leaves the batch.

    Args:
        x, y: starts, float (N, C, H, W) in [0, 1], which are not changed; labels int64 (N,).
        targets: (N,), energies to stop at (see stop_targets). steps: the most any image takes.
        step_size eta, momentum zeta (.8: a step is still felt five steps later, which carries a
            walk over the ripples of a rough landscape), noise (a std): in pixel units.
        guide: what g is the gradient of, a function (logits, y) -> (N,): E(x, y), or cross_entropy,
            which is E(x, y) - E(x) and looks at the class alone.
        on_progress: called before every step as (step, x, rows that still walk).
    Returns: images like x, and a dict of (N,): steps, energy_start, energy_end, target.
    Source: Mirza et al. 2024, section 4 (walk); Mirza et al. 2025 (stopping).
    """
    check_attack(x, y, 0.0, "linf")
    x, nu, walks = x.clone(), torch.zeros_like(x), torch.arange(len(x), device=x.device)
    taken, start, end = torch.zeros_like(y), None, x.new_full((len(x),), math.nan)

    for step in range(steps + 1):
        g = torch.empty_like(x[walks])
        for part in torch.arange(len(walks), device=x.device).split(batch_size):
            rows = walks[part]
            with attack_mode(model):
                _, g[part], logits = gradient_of(model, x[rows], y[rows], guide)
            end[rows] = energy_xy(logits, y[rows])
        start = end.clone() if step == 0 else start
        go = end[walks] > targets[walks]  # NaN is not above: a walk that has lost its way ends
        walks, nu, g = walks[go], nu[go], g[go]
        if on_progress:
            on_progress(step, x, walks)
        if step == steps or not len(walks):
            break
        nu = momentum * nu + ascend(0.0, g, -step_size, "l2")  # down: minus a step along g / |g|
        jitter = noise * torch.randn(nu.shape, generator=generator, device=x.device)
        x[walks] = (x[walks] + nu + jitter).clamp(0, 1)
        taken[walks] += 1
    return x, {"steps": taken, "energy_start": start, "energy_end": end, "target": targets}


@torch.no_grad()
def generate(model, pcas, energies, y, *, init="local-pca", neighbours=10, temperature=1.5,
             candidates=8, stop="sampled", quantile=0.5, seed=0, batch_size=500, on_progress=None,
             **walk):  # fmt: skip
    """Pictures of the classes y: starts by class-wise PCA, chosen and walked on by energy.

    Energy guidance of the start (E18): of `candidates` starts per image the one is kept whose
    E(x, y) is nearest to a draw from the real energies of its class. (The lowest would be the wrong
    rule: it prefers caricatures.) With stop="sampled" the walk ends at that same draw.

    Args:
        pcas, energies: of real images, one of each per class: see fit_pca and class_energies.
        y: int64 (N,), on the model's device. The others: see draw_starts, stop_targets, sgld.
        seed: same seed, same pictures.
    Returns: images (N, C, H, W) in [0, 1] and the record of sgld.
    Raises: BadInput. Source: Mirza et al. 2025.
    """
    if candidates < 1:
        raise BadInput(f"candidates must be at least 1, not {candidates}")
    if len(y) and not 0 <= y.min() <= y.max() < len(pcas):
        raise BadInput(f"classes {y.min()} to {y.max()} asked for, but there are {len(pcas)}")
    draw = torch.Generator(y.device).manual_seed(seed)
    x = torch.empty(len(y), *pcas[0].shape, device=y.device)
    targets = torch.empty(len(y), device=y.device)
    for k in y.unique().tolist():
        rows = (y == k).nonzero()[:, 0]
        n, wanted = len(rows), stop_targets(energies[k], len(rows), "sampled", generator=draw)
        nearest = torch.full_like(wanted, math.inf)
        for _ in range(candidates):  # one at a time: all at once would fill the memory
            starts, energy = draw_starts(pcas[k], n, init, neighbours, temperature, draw), wanted
            if candidates > 1:  # else there is nothing to choose, and the network is not asked
                energy = -exact_logits(model, starts, batch_size)[:, k]
            gap = (energy - wanted).abs().nan_to_num(math.inf)  # NaN: only if all before are
            better = gap <= nearest
            x[rows[better]], nearest[better] = starts[better], gap[better]
        sampled = stop == "sampled"
        targets[rows] = wanted if sampled else stop_targets(energies[k], n, stop, quantile)
    return sgld(model, x, y, targets, batch_size=batch_size, generator=draw,
                on_progress=on_progress, **walk)  # fmt: skip


# ##################################################################################################
# PART TWO: what the story stands on. Look things up in it; Python finds names when they are called.
# ##################################################################################################


# ==== 7. What attacks stand on: a model left as it was, images as they should be =================


@contextlib.contextmanager
def attack_mode(model, batchnorm="eval", freeze=True):
    """Lets an attack run the model without leaving a trace in it.

    "eval" puts every submodule in eval mode: BatchNorm uses its running statistics. "train" leaves
    the modes alone (in train mode BatchNorm uses the batch's own) but no statistics are recorded.
    Flags are set, no module's own train() is called.
    freeze: the weights want no gradient meanwhile. torch.compile needs that said beforehand, or the
    attack's backward pass computes all of theirs.
    """
    off = {"eval": "training", "train": "track_running_stats"}[batchnorm]
    frozen = [p for p in model.parameters() if freeze and p.requires_grad and not p.is_inference()]
    switches = [(m, off) for m in model.modules() if getattr(m, off, False)]
    switches += [(p, "requires_grad") for p in frozen]
    try:
        for owner, name in switches:  # all are on: off, and on again at the end
            setattr(owner, name, False)
        yield
    finally:
        for owner, name in switches:
            setattr(owner, name, True)


def check_attack(x, y, eps, norm):
    """Raises BadInput for what attacks silently go wrong on: normalised or integer images ..."""
    if norm not in ("linf", "l2"):
        raise BadInput(f"unknown norm '{norm}': choose from linf, l2")
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):  # half rounds eps away
        raise BadInput(f"attacks take float32 images (N, C, H, W), not {x.dtype} {tuple(x.shape)}")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise BadInput(f"labels must be int64 of shape ({len(x)},), not {y.dtype} {tuple(y.shape)}")
    if not 0 <= eps <= (1 if norm == "linf" else math.inf):
        raise BadInput(f"eps must be >= 0, in units of [0, 1] such as 8/255, not {eps}")
    if len(x) and not (x.min() >= 0 and x.max() <= 1):
        raise BadInput(f"images must lie in [0, 1], found {x.min():.3g} to {x.max():.3g}:"
                       " normalisation belongs inside the model")  # fmt: skip


# ==== 8. Rivals: TRADES, MART, WEAT, GradAlign, AWP, and the list of methods ======================


def kl_divergence(logits, logits_adv):
    """KL(p(.|x) || p(.|x*)) of each image: two (N, K) -> (N,)."""
    log_p, log_q = logits.float().log_softmax(1), logits_adv.float().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def nudged_pgd(model, x, y, eps, steps=10, step_size=None, *, generator=None, **options):
    """PGD that starts a hair off x, as TRADES and its heirs do: KL has no gradient at x itself."""
    start = x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device)
    return pgd(model, x, y, eps, steps, step_size, start=start, **options)


def kl_pgd(model, x, y, eps, steps=10, step_size=None, *, batchnorm="eval", **options):
    """PGD on KL(p(.|x) || p(.|x*)), the attack of TRADES. Arguments as for pgd."""
    check_attack(x, y, eps, options.get("norm", "linf"))
    with attack_mode(model, batchnorm), torch.no_grad():
        clean = model(x)
    options |= dict(loss=lambda logits, _: kl_divergence(clean, logits), batchnorm=batchnorm)
    return nudged_pgd(model, x, y, eps, steps, step_size, **options)


def trades_loss(logits, logits_adv, y, beta=6.0):
    """(E19) TRADES: CE(f(x), y) + beta * KL(p(.|x) || p(.|x*)). A scalar.

    In energies KL = sum_k p(k|x) (E(x*, k) - E(x, k)) + dE(x): part of what TRADES presses down IS
    the delta energy. Its authors pass x through the network twice in train mode, which moves
    BatchNorm's statistics further; here once.
    Source: Zhang et al. 2019; the identity: Mirza et al. 2024, proposition 1.
    """
    return (cross_entropy(logits, y) + beta * kl_divergence(logits, logits_adv)).mean()


def mart_loss(logits, logits_adv, y, beta=5.0):
    """(E20) MART: BCE(p(x*), y) + beta * mean KL(p(.|x) || p(.|x*)) (1 - p(y|x)). A scalar.

    BCE = -log p(y|x*) - log(1 - max_{k != y} p(k|x*)), the cross-entropy "boosted" by a margin; the
    factor 1 - p(y|x) lets misclassified images count more. Source: Wang et al. 2020, equation 11.
    """
    rival = logits_adv.float().softmax(1).scatter(1, y[:, None], 0).amax(1)
    boosted = cross_entropy(logits_adv, y) - torch.log1p(1e-4 - rival)  # 1e-4: finite at rival 1
    doubt = 1 - (-cross_entropy(logits, y)).exp()
    return (boosted + beta * kl_divergence(logits, logits_adv) * doubt).mean()


def weat_loss(logits, logits_adv, y, beta=6.0, natural=True):
    """(E21) WEAT: mean w (CE(y) + beta * KL(p(.|x) || p(.|x*))), CE on x, or on x*. A scalar.

    The weights w = 1 / log(1 + exp|E(x)|), detached, make images of energy near 0, about which the
    model has learnt least, count most. Source: Mirza et al. 2024, section 3.3.
    """
    w = 1 / F.softplus(energy_x(logits).abs()).detach()
    ce = cross_entropy(logits if natural else logits_adv, y)
    return (w * (ce + beta * kl_divergence(logits, logits_adv))).mean()


def grad_align(model, x, y, noise):
    """(E22) GradAlign: 1 - mean cos(grad_x CE(x), grad_x CE(x + noise)), noise ~ U(-eps, eps).

    Catastrophic overfitting shows as a gradient that turns within the ball, so its turning is
    penalised. Needs second derivatives, hence its price: several times FGSM. As in its authors'
    code the gradient at x is a constant, towards which that at x + noise is turned.
    Source: Andriushchenko & Flammarion 2020, equation 5.
    """
    slopes = []
    for point, differentiable in ((x, False), (x + noise, True)):
        point = point.detach().requires_grad_(True)
        loss = cross_entropy(model(point), y).sum()
        slopes += torch.autograd.grad(loss, point, create_graph=differentiable)
    return 1 - F.cosine_similarity(slopes[0].flatten(1), slopes[1].flatten(1)).mean()


@contextlib.contextmanager
def adversarial_weights(model, objective, gamma):
    """(E23) AWP: while open, every weight matrix w is shifted by gamma |w| g / |g|, g = dL/dw.

    Against robust overfitting: the loss is made small in a whole neighbourhood of the weights.
    `objective()` returns the loss; gamma 0 shifts nothing. Afterwards the weights are restored
    exactly. Source: Wu et al. 2020, section 4.1.
    """
    weights = [w for w in model.parameters() if gamma and w.ndim > 1 and w.requires_grad]
    before = [w.detach().clone() for w in weights]  # no biases, no BatchNorm
    if weights:
        with attack_mode(model, "train", freeze=False):
            gradients = torch.autograd.grad(objective(), weights, materialize_grads=True)
        mean_over_processes(gradients)
        with torch.no_grad():
            for w, g in zip(weights, gradients):
                w += gamma * w.norm() * g / (g.norm() + 1e-12)
    try:
        yield
    finally:
        with torch.no_grad():
            for w, kept in zip(weights, before):
                w.copy_(kept)


@dataclass(frozen=True)
class Method:
    """A way of training: its attack, its loss, and whether that looks at logits of clean images."""

    attack: object = None  # as pgd is called, or fgsm
    loss: object = adversarial_loss  # (logits, logits_adv, y, beta) -> scalar
    needs_clean: bool = False


METHODS = {
    "none": Method(),
    "fgsm": Method(fgsm),
    "rs-fgsm": Method(rs_fgsm),
    "n-fgsm": Method(n_fgsm),
    "pgd": Method(pgd),
    "trades": Method(kl_pgd, trades_loss, True),
    "mart": Method(nudged_pgd, mart_loss, True),
    "weat-nat": Method(kl_pgd, weat_loss, True),
    "weat-adv": Method(kl_pgd, partial(weat_loss, natural=False), True),
}
SINGLE_STEP = (fgsm, rs_fgsm, n_fgsm)


# ==== 9. Networks: pre-activation residual ones ===================================================


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each AFTER its BatchNorm and ReLU, and a shortcut around both.

    The 1x1 shortcut sees relu(bn1(x)), as in Rice's and AWP's networks; in Wong's, GradAlign's and
    N-FGSM's it sees x. Initialised as torch does; wide networks elsewhere often by Kaiming fan-out.
    """

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        same = stride == 1 and c_in == c_out
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x):
        """x (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        return self.conv2(out) + skip


class PreActResNet(nn.Module):
    """Images in [0, 1] in, logits out: (N, C, H, W) -> (N, K). Normalises them itself.

    With mean and std INSIDE the model eps is measured in pixels everywhere and no attack can forget
    to normalise. Source: He et al. 2016; the wide ones: Zagoruyko & Komodakis 2016.
    """

    def __init__(self, widths, depths, stem, stem_stride, num_classes, in_channels, mean, std):
        super().__init__()
        for name, value, default in (("mean", mean, 0.5), ("std", std, 0.25)):
            value = [default] * in_channels if value is None else value
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1))
        self.stem = nn.Conv2d(in_channels, stem, 3, stem_stride, padding=1, bias=False)
        blocks, c_in = [], stem
        for stage, (c_out, depth) in enumerate(zip(widths, depths)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(PreActBlock(c_in, c_out, stride))
                c_in = c_out
        self.blocks, self.bn = nn.Sequential(*blocks), nn.BatchNorm2d(c_in)
        self.head = nn.Linear(c_in, num_classes)

    def forward(self, x):
        """Images (N, C, H, W) in [0, 1] -> logits (N, K)."""
        x = self.blocks(self.stem((x - self.mean) / self.std))
        return self.head(F.relu(self.bn(x)).mean((2, 3)))


MODELS = ("small", "preactresnet18", "wrn-28-10", "wrn-34-10")


def make_model(name="small", num_classes=10, in_channels=3, mean=None, std=None, width=16):
    """A fresh PreActResNet; its `.spec` holds what load_model needs to build it again.

    Args: name, one of MODELS; mean and std, per channel in [0, 1] units (default .5 and .25);
        width, channels of the first stage, at least 8; for `small` only. Raises: BadInput.
    """
    check_choice("model", name, MODELS)
    if not 8 <= width <= 512:  # 512: 311 M parameters
        # On processors with AVX2 but no AVX-512, torch 2.13's weight gradient of a 1x1, stride-2
        # convolution of fewer channels writes outside its memory: a crash, or worse, none.
        raise BadInput(f"width must be at least 8 and at most 512, not {width}")
    layout = {  # widths and depths of the stages, channels and stride of the stem
        "small": ([width, 2 * width, 4 * width, 8 * width], [1] * 4, width, 2),  # .31 M parameters
        "preactresnet18": ([64, 128, 256, 512], [2] * 4, 64, 1),  # 11.17 M
        "wrn-28-10": ([160, 320, 640], [4] * 3, 16, 1),  # 36.5 M; depth 28 = 6 * 4 + 4
        "wrn-34-10": ([160, 320, 640], [5] * 3, 16, 1),  # 46.2 M
    }[name]
    model = PreActResNet(*layout, num_classes, in_channels, mean, std)
    model.spec = dict(name=name, num_classes=num_classes, in_channels=in_channels, width=width)
    return model.to(memory_format=torch.channels_last)


def build_model(config, data):
    """The seeded model of a run, normalised by the mean and std of its training images."""
    x = as_pixels(data.x_train[evenly(10_000, len(data.x_train))])
    mean, std = x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).clamp_min(1e-3).tolist()
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # the caller's stay as they were
        torch.manual_seed(config.seed)
        return make_model(config.model, len(data.classes), x.shape[1], mean, std, config.width)


# ==== 10. Data: the embedded `shapes`, torchvision's sets, and a user's own files =================


@dataclass
class Data:
    """Three splits, uint8 images (N, C, H, W) and int64 labels (N,), and the class names."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_val: torch.Tensor
    y_val: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: list
    name: str
    note: str = ""  # what was left out while reading

    def to(self, device):
        """The same data on `device`, images channels-last, as the convolutions want them."""
        moved = {k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)}
        for k in ("x_train", "x_val", "x_test"):
            moved[k] = moved[k].contiguous(memory_format=torch.channels_last)
        return dataclasses.replace(self, **moved)


def checksum(data):
    """A number that changes with the training images and their labels."""
    number = zlib.crc32(data.y_train.cpu().contiguous().numpy())
    return zlib.crc32(data.x_train.cpu().contiguous().numpy(), number)


def _box(u, v, a, b):  # signed distance to an axis-aligned box of half-sides a and b
    return torch.maximum(u.abs() - a, v.abs() - b)


def _star(u, v):  # folded into one tenth: the line from a tip at radius 1.1 to a notch at .45
    turn = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(u, -v) + turn / 2, turn) - turn / 2
    du, dv = 0.45 * math.cos(turn / 2) - 1.1, 0.45 * math.sin(turn / 2)
    r = torch.hypot(u, v)
    return (dv * (r * angle.cos() - 1.1) - du * r * angle.sin().abs()) / math.hypot(du, dv)


# Signed distance from points (u, v) to the outline: negative inside, positive outside. Shapes are
# about one unit in radius, made by min (union), max (intersection) and |d| - w (a band of
# half-width w).
SHAPES = {
    "disc": lambda u, v: torch.hypot(u, v) - 0.9,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.75).abs() - 0.22,
    "square": lambda u, v: _box(u, v, 0.8, 0.8),
    "triangle": lambda u, v: torch.maximum(u.abs() * 0.866 - v * 0.5, v) - 0.55,
    "plus": lambda u, v: torch.minimum(_box(u, v, 1.0, 0.3), _box(u, v, 0.3, 1.0)),
    "star": _star,
    "crescent": lambda u, v: torch.maximum(torch.hypot(u, v) - 1, 0.8 - torch.hypot(u - 0.45, v)),
    "bars": lambda u, v: _box(u.abs() - 0.6, v, 0.25, 0.9),
    "frame": lambda u, v: _box(u, v, 0.7, 0.7).abs() - 0.18,
    "H": lambda u, v: torch.minimum(_box(u.abs() - 0.65, v, 0.2, 0.9), _box(u, v, 0.65, 0.2)),
}


def make_shapes(n, seed):
    """Draws the teaching set: `n` 32x32 colour images of ten shapes, reproducible by seed.

    Each image is a soft-edged shape over a smooth background, and a faint grating whose direction
    and period depend on the class. The grating (amplitude .075, just below eps = 20/255 = .078)
    predicts the class perfectly and an attack can erase or forge it: the non-robust feature that
    makes single-step training collapse here within minutes, as it does on CIFAR-10 within hours.

    Args: n, number of images; seed, int.
    Returns: images uint8 (n, 3, 32, 32); labels int64 (n,), as many of each class as n allows.
    """
    # NumPy draws (its PCG64 stream is the same everywhere) and float64 keeps differences between
    # machines' sin and cos far below one step of the final rounding to 8 bits.
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.permutation(np.arange(n) % 10))

    def uniform(low, high, *shape):
        """Uniform numbers (n, *shape) in float64."""
        return torch.from_numpy(rng.uniform(low, high, (n, *shape)))

    size, turn = uniform(0.5, 0.8, 1, 1), uniform(-22, 22, 1, 1) * math.pi / 180
    room = 0.5 * (1 - size)  # how far the centre may move and leave the shape inside the picture
    cx, cy = uniform(-1, 1, 1, 1) * room, uniform(-1, 1, 1, 1) * room
    hue = (labels / 10 + uniform(-0.25, 0.25)) % 1.0  # follows the class only loosely
    saturation, value = uniform(0.4, 1.0), uniform(0.35, 0.95)
    ground, direction = uniform(0, 0.6, 2, 3), uniform(0, 2 * math.pi, 1, 1)
    clouds = torch.from_numpy(rng.normal(0, 0.06, (n, 3, 6, 6)))
    phase = uniform(0, 2 * math.pi, 1, 1)

    axis = (torch.arange(32, dtype=torch.float64) + 0.5) / 16 - 1  # pixel centres in [-1, 1]
    gy, gx = axis[:, None], axis[None, :]
    u = ((gx - cx) * turn.cos() + (gy - cy) * turn.sin()) / size  # into the shape's own frame
    v = ((gy - cy) * turn.cos() - (gx - cx) * turn.sin()) / size
    inside = torch.empty_like(u)  # (n, 32, 32): 1 inside, 0 outside, soft over about one pixel
    for k, distance_to in enumerate(SHAPES.values()):
        of_class = labels == k
        distance = distance_to(u[of_class], v[of_class])
        inside[of_class] = (0.5 - distance * size[of_class] * 16).clamp(0, 1)

    # hue, saturation, value -> red, green, blue
    wheel = (hue[:, None] * 6 + torch.tensor([5.0, 3.0, 1.0])) % 6
    ramp = torch.minimum(wheel, 4 - wheel).clamp(0, 1)
    colour = value[:, None] * (1 - saturation[:, None] * ramp)  # (n, 3)
    blend = (0.5 + 0.35 * (gx * direction.cos() + gy * direction.sin())).unsqueeze(1)
    first, second = ground[:, 0, :, None, None], ground[:, 1, :, None, None]
    picture = first + (second - first) * blend
    picture += F.interpolate(clouds, size=32, mode="bilinear", align_corners=True)
    picture += (colour[:, :, None, None] - picture) * inside.unsqueeze(1)
    tilt = ((labels % 5) * math.pi / 5)[:, None, None]
    periods = torch.where(labels < 5, 5.0, 9.0)[:, None, None]
    wave = gx * tilt.cos() + gy * tilt.sin()
    picture += 0.075 * (math.pi * periods * wave + phase).sin().unsqueeze(1)
    return picture.clamp_(0, 1).mul_(255).round_().to(torch.uint8), labels


def load_data(name="shapes", data_dir="data", limit=0, val_fraction=0.1, seed=0):
    """Loads a data set and splits it into train, validation and test.

    The validation split is held out of the training images (stratified, seeded) unless the data
    bring one: the best epoch is chosen there, never on test.

    Args:
        name: one of DATASETS; a path to an .npz with MedMNIST's keys (train_images (N, H, W) or
            (N, H, W, C) uint8, train_labels (N,) or (N, 1), test_..., optional val_...); or to a
            folder with train/<class>/, test/<class>/, optional val/ (or valid/, validation/).
        data_dir: where torchvision's sets lie or are downloaded to.
        limit: train on that many images, stratified; 0 = all. Validation and test stay whole.
        val_fraction: share of the training images held out. seed: of the splits, and of `shapes`.
    Returns: Data, on the CPU.
    Raises: BadInput for an unknown name or unusable data; RunError for files that cannot be had.
    """
    name, note = str(name), ""
    if name == "shapes":
        classes = list(SHAPES)
        splits = {"train": make_shapes(5500, seed), "test": make_shapes(2000, seed + 1_000_003)}
    elif name in TORCHVISION_SETS:
        splits, classes = load_torchvision(name, data_dir)
    elif name.endswith(".npz"):
        splits, classes = load_npz(name)
    elif os.path.isdir(name):
        splits, classes, note = load_folder(name)
    elif os.sep in name:
        raise RunError(f"no data at '{name}': give an .npz file or a folder with train/ and test/")
    else:
        check_choice("data set", name, DATASETS)
    for split, (x, y) in splits.items():
        if len(x) == 0 or x.shape[1:] != splits["train"][0].shape[1:]:
            raise BadInput(f"'{name}': {split} has no images, or images of another size than train")
        if y.min() < 0 or y.max() >= len(classes):
            raise BadInput(f"'{name}': the labels of {split} must lie in 0..{len(classes) - 1}:"
                           f" train has {len(classes)} classes, number them 0, 1, ...")  # fmt: skip
    x, y = splits["train"]
    if "val" not in splits:
        count = round(len(y) * val_fraction)
        if not 0 < count < len(y):
            raise BadInput(f"'{name}': val_fraction {val_fraction:g} leaves a split empty")
        held_out = torch.zeros(len(y), dtype=torch.bool)
        held_out[stratified(y, count, seed)] = True
        splits["val"], (x, y) = (x[held_out], y[held_out]), (x[~held_out], y[~held_out])
    if limit:
        if not len(classes) <= limit <= len(y):
            raise BadInput(f"limit {limit} must lie between {len(classes)} (classes) and {len(y)}")
        chosen = stratified(y, limit, seed)
        x, y = x[chosen], y[chosen]
    if missing := set(range(max(2, len(classes)))) - set(y.tolist()):
        raise BadInput(f"'{name}': class {min(missing)} has no images to train on: give two classes"
                       " or more, or raise limit")  # fmt: skip
    return Data(x, y, *splits["val"], *splits["test"], classes, name, note)


TORCHVISION_SETS = {  # name: what to put into the data directory where the download does not work
    "cifar10": "cifar-10-python.tar.gz (or the unpacked folder cifar-10-batches-py)",
    "cifar100": "cifar-100-python.tar.gz (or the unpacked folder cifar-100-python)",
    "svhn": "(after pip install scipy, which reads them) train_32x32.mat and test_32x32.mat",
    "mnist": "the four files *-ubyte.gz of MNIST, in MNIST/raw/,",
    "fashion-mnist": "the four files *-ubyte.gz of Fashion-MNIST, in FashionMNIST/raw/,",
}
DATASETS = ("shapes", *TORCHVISION_SETS)
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_torchvision(name, data_dir):
    """Splits and class names of one of torchvision's sets, downloaded when missing."""
    sets = import_torchvision().datasets
    splits, classes = {}, [str(k) for k in range(10)]
    try:
        for split in ("train", "test"):
            if name == "svhn":
                import scipy.io  # noqa: F401  (torchvision's reader: missed before the download)
                found = sets.SVHN(data_dir, split, download=True)
                images, y = found.data.transpose(0, 2, 3, 1), found.labels
            else:
                kind = name.upper() if name != "fashion-mnist" else "FashionMNIST"
                found = getattr(sets, kind)(data_dir, train=split == "train", download=True)
                images, y, classes = found.data, found.targets, list(found.classes)
            splits[split] = to_nchw(images, name), torch.as_tensor(np.asarray(y)).long()
    except Exception as error:  # no host, no disk, or one of the many kinds of damage
        raise RunError(f"{name} could not be downloaded or read ({' '.join(str(error).split())})."
                       f" Put {TORCHVISION_SETS[name]} into '{data_dir}', or name another folder"
                       " with --data-dir") from error  # fmt: skip
    return splits, classes


def import_torchvision():
    """torchvision, also where its wheel was made for CUDA and lies beside a CPU torch."""
    try:
        import torchvision.datasets
    except RuntimeError:  # "operator torchvision::nms does not exist", which nothing here needs:
        for op in ("nms", "qnms"):  # a signature without an implementation is enough
            torch.library.define(f"torchvision::{op}", "(Tensor a, Tensor b, float c) -> Tensor")
        import torchvision.datasets
    return torchvision


def load_npz(path):
    """Splits and class names from an .npz with MedMNIST's keys."""
    if not os.path.isfile(path):  # reading a FIFO or a device might never end
        raise RunError(f"no file '{path}', or no regular one")
    try:
        with np.load(path, allow_pickle=False) as archive:  # a pickle would run its author's code
            size = sum(part.file_size for part in archive.zip.infolist())
            if size > max(2**30, 200 * os.path.getsize(path)):  # images shrink tenfold or so
                raise OSError(f"a bomb of {size / 2**30:.1f} GB")
            keys = [k for k in archive.files if re.fullmatch("(train|val|test)_(images|labels)", k)]
            arrays = {k: np.asarray(archive[k]) for k in keys}
    except Exception as error:  # damage brings out a dozen kinds, MemoryError among them
        raise RunError(f"'{path}' cannot be read as an .npz of plain arrays: {error}") from error
    splits = {}
    for split in ["train", "test"] + ["val"] * ("val_images" in arrays or "val_labels" in arrays):
        x, y = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if x is None or y is None:
            raise BadInput(f"'{path}' lacks {split}_images or {split}_labels: {archive.files[:9]}")
        x = to_nchw(x, f"'{path}' {split}_images")
        if y.size != len(x) or y.dtype.kind not in "iu":
            raise BadInput(f"'{path}' {split}_labels: not {len(x)} integers but {y.dtype}{y.shape}")
        splits[split] = x, torch.from_numpy(y.reshape(-1).astype(np.int64))
    return splits, [str(k) for k in range(len(splits["train"][1].unique()))]


def load_folder(path):
    """Splits, class names and a note from a folder with train/<class>/ and test/<class>/."""
    splits, classes, seen, left_out = {}, None, set(), []
    for split, names in dict(train="train", val="val or valid or validation", test="test").items():
        there = [f for name in names.split(" or ") if os.path.isdir(f := os.path.join(path, name))]
        if split == "val" and not there:
            continue
        if len(there) != 1:
            raise RunError(f"folder '{path}' must have one {names}/ with a folder per class")
        try:
            files = find_pictures(there[0], seen, left_out)
        except (OSError, RecursionError) as error:
            raise RunError(f"folder '{there[0]}' cannot be read: {error}") from error
        kinds = [os.path.relpath(file, there[0]).split(os.sep) for file in files]
        found, y = np.unique([k[0] for k in kinds], return_inverse=True)
        if classes not in (None, found.tolist()) or min(map(len, kinds)) < 2:
            raise BadInput(f"folder '{there[0]}' has pictures in no class, or not train/'s classes")
        classes, images = found.tolist(), []
        for file in files:
            images.append(read_picture(file))
            if images[-1].shape != images[0].shape:
                raise BadInput(f"'{file}' is {images[-1].shape}, '{files[0]}' is {images[0].shape}:"
                               " give pictures of one size, all grey or all colour")  # fmt: skip
        splits[split] = to_nchw(images, f"'{files[0]}' and the others"), torch.from_numpy(y)
    return splits, classes, f"{len(left_out)} hidden or other files left out" * bool(left_out)


def find_pictures(folder, seen, left_out):
    """Paths of the pictures in a folder and below it; hidden and other files go to `left_out`.

    `seen`: the folders read so far. A link back to one would double its pictures (in train and
    test: a leak), or never end; so would the second copies in the hidden .ipynb_checkpoints.
    """
    if (real := os.path.realpath(folder)) in seen:
        raise RunError(f"'{folder}' leads to a folder that is read already: remove that link")
    seen.add(real)
    found = []
    for name in sorted(os.listdir(folder)):
        path, hidden = os.path.join(folder, name), name.startswith(".")
        if not hidden and os.path.isdir(path):
            found += find_pictures(path, seen, left_out)
        else:
            (found if name.lower().endswith(PICTURES) and not hidden else left_out).append(path)
    if not found:
        raise RunError(f"no picture ({', '.join(PICTURES)}) in '{folder}': fill or remove it")
    return found


def read_picture(path):
    """Pixels as a viewer shows them, EXIF obeyed, on white: uint8 (H, W[, 3]). Raises: RunError."""
    from PIL import Image, ImageOps  # torchvision's own requirement

    try:
        if not os.path.isfile(path):
            raise OSError("no regular file, or a link to nothing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is refused here
            image = Image.open(path)  # reads the header only
        with image:
            if max(image.size) > 4096 or image.mode[0] in "IF":  # or Pillow cuts off at 255
                raise OSError(f"mode {image.mode}, {image.size}: give 8 bits, up to 4096x4096")
            grey = image.mode in ("1", "L", "LA")
            image = ImageOps.exif_transpose(image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("L" if grey else "RGB"))
    except Exception as error:  # damage brings out a dozen kinds
        raise RunError(f"picture '{path}' cannot be used: {error}") from error


def to_nchw(images, where):
    """NumPy uint8 (N, H, W) or (N, H, W, C) -> tensor (N, C, H, W), square, C 1 or 3."""
    images = np.asarray(images)
    images = images[..., None] if images.ndim == 3 else images
    square_ones = images.ndim == 4 and images.shape[1] == images.shape[2] >= 8
    if images.dtype != np.uint8 or not square_ones or images.shape[3] not in (1, 3):
        raise BadInput(f"{where}: images must be uint8 (N, S, S[, 1 or 3]), S >= 8, not"
                       f" {images.dtype} {images.shape}")  # fmt: skip
    if images.size and images.max() < 32:  # zeros and ones, 4 bits: they would be nearly black
        raise BadInput(f"{where}: no value is above {images.max()}; scale images to 0..255")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def evenly(count, n):
    """`count` indices spread over n rows. (The first rows of a folder are all of one class.)"""
    return torch.arange(min(count, n)) * n // max(min(count, n), 1)


def stratified(y, count, seed):
    """`count` indices into labels y (N,), each class by its share, in a seeded random order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
    by_class = order[torch.argsort(y[order], stable=True)]
    chosen = by_class[evenly(count, len(y))]
    return chosen[torch.from_numpy(np.random.default_rng(seed + 1).permutation(count))]


def as_pixels(x):
    """Images as float in [0, 1]: uint8 is divided by 255, float stays."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def augment(x, how, generator=None):
    """Random crops of a batch, padded by an eighth of the side (4 of 32), and horizontal flips.

    Args: x, images (N, C, H, W) of any dtype; how, "none", "crop" or "crop-flip".
    Returns: images of the same shape and dtype, laid out channels-last.
    """
    if how == "none":
        return x
    n, _, height, width = x.shape
    pad = min(height, width) // 8  # 4 everywhere would shift half of an 8x8 digit out of sight
    random = torch.rand(3, n, generator=generator, device=x.device)
    row, col = (random[:2] * (2 * pad + 1)).long()
    windows = F.pad(x, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # every crop, a view
    x = windows[torch.arange(n, device=x.device), :, row, col]
    if how == "crop-flip":
        x = torch.where(random[2].view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
    return x.contiguous(memory_format=torch.channels_last)


# ==== 11. Judging robustness: losses to climb, APGD, Square, the worst case =======================


def margin(logits, y):
    """max_{k != y} f(x)[k] - f(x)[y]: positive exactly when x is misclassified. -> (N,).

    It does not flatten out where the model is confident. Source: Carlini & Wagner 2017.
    """
    return logits.float().scatter(1, y[:, None], -math.inf).amax(1) + energy_xy(logits, y)


def dlr(logits, y, target=None):
    """(E24) margin / (f_(1) - f_(3)), f_(i) the i-th largest logit: the same at any scale of them.

    To reach `target` t instead of leaving y: (E25) (f[t] - f[y]) / (f_(1) - (f_(3) + f_(4)) / 2).
    Fewer than 3 (4) classes have no such denominator: the numerator alone is climbed.
    Source: Croce & Hein 2020, equations 6 and 7.
    """
    needed = 3 if target is None else 4
    rise = margin(logits, y) if target is None else energy_xy(logits, y) - energy_xy(logits, target)
    if logits.shape[1] < needed:
        return rise
    top = logits.float().topk(needed).values
    return rise / (top[:, 0] - top[:, 2:].mean(1) + 1e-12)


def likelier(logits, y):
    """-E(x): climbing it makes the image likelier to the model, whatever its label. -> (N,)."""
    return -energy_x(logits)


def fooling_and_unlikely(logits, y):
    """(E26) The margin until x is misclassified, from there on E(x): adversarial AND unlikely.

    A constant, 1000, ranks all fooling points above all others. -> (N,).
    """
    climbed = margin(logits, y)
    return torch.where(climbed > 0, 1000 + energy_x(logits), climbed)


def exact_logits(model, x, batch_size=500):
    """Logits (N, K) of x, float or uint8, in eval mode and true fp32: what claims are judged by."""
    with torch.no_grad(), attack_mode(model), autocast(x.device, torch.float32), true_fp32():
        return torch.cat([model(as_pixels(part)).float() for part in x.split(batch_size)])


def is_right(logits, y):
    """Which images (N,) are classified correctly. NaN or infinite logits are no answer: wrong."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def choose(where, a, b):
    """a in the rows marked by where (N,), else b; a and b (N, ...)."""
    return torch.where(where.view(-1, *[1] * (a.ndim - 1)), a, b)


def apgd_checkpoints(steps):
    """The steps at which apgd reconsiders its step size: 22, 41, 57, 70, 80, 87, 93, 99 of 100."""
    gaps = [max(22 - 3 * k, 6) for k in range(13)]  # percent; a gap of 6 at least
    return {math.ceil(percent * steps / 100) for percent in np.cumsum(gaps) if percent <= 100}


@torch.no_grad()
def apgd(model, x, y, eps, steps=100, *, norm="linf", loss=cross_entropy, until_fooled=True,
         generator=None):  # fmt: skip
    """(E27) Auto-PGD: projected gradient ascent with momentum that finds its own step size.

        z       = project(x_k + step * direction)
        x_{k+1} = project(x_k + .75 (z - x_k) + .25 (x_k - x_{k-1}))

    step begins at 2 eps. At a checkpoint (see apgd_checkpoints) an image's step is halved, and it
    goes back to its best point, if fewer than 75% of the steps since the last checkpoint raised the
    loss, or if neither step nor best loss have changed since.

    Args: as for pgd; until_fooled, whether any misclassified point is preferred to the best one.
    Returns: x_adv, like x: a misclassified point, where one was found; else, or with
        until_fooled=False, that of the highest loss.
    Raises: BadInput. Source: Croce & Hein 2020, algorithm 1.
    """
    check_attack(x, y, eps, norm)
    at = before = best = fooling = (x + random_noise(x, eps, norm, generator)).clamp(0, 1)
    value = best_value = value_at_check = x.new_full((len(x),), -math.inf, dtype=torch.float32)
    step, best_gradient = x.new_full((len(x), 1, 1, 1), 2 * eps), x
    fooled, last_check = torch.zeros_like(y, dtype=torch.bool), 0
    rises = torch.full_like(y, -1)  # the first value exceeds -inf, which is no rise
    halved = ~fooled  # so nothing is "stuck" at the first checkpoint
    checkpoints = apgd_checkpoints(steps)
    with attack_mode(model):
        for k in range(steps + 1):
            old = value
            value, gradient, logits = gradient_of(model, at, y, loss)
            wrong, better = ~is_right(logits, y), value > best_value
            fooled, fooling = fooled | wrong, choose(wrong, at, fooling)
            best, best_value = choose(better, at, best), choose(better, value, best_value)
            best_gradient = choose(better, gradient, best_gradient)
            rises = rises + (value > old)
            if k == steps or (until_fooled and fooled.all()):
                break
            if k in checkpoints:
                stuck = ~halved & (best_value <= value_at_check)
                halved = (rises < 0.75 * (k - last_check)) | stuck
                step, at = choose(halved, step / 2, step), choose(halved, best, at)
                gradient = choose(halved, best_gradient, gradient)
                value = choose(halved, best_value, value)
                value_at_check, rises, last_check = best_value, 0 * rises, k
            a = 0.75 if k else 1.0  # no momentum yet
            z = project(ascend(at, gradient, step, norm), x, eps, norm)
            z = project(at + a * (z - at) + (1 - a) * (at - before), x, eps, norm)
            before, at = at, z
    return choose(fooled & until_fooled, fooling, best)


@torch.no_grad()
def apgd_t(model, x, y, eps, steps=100, targets=9, *, norm="linf", generator=None):
    """(E28) Targeted APGD: towards each of the likeliest wrong classes in turn, with (E25).

    Args: targets, how many classes at most (all wrong ones of 2 to 10 classes; with 100, the 9
        likeliest). The others as for apgd; an image that has fallen is not attacked again.
    Returns: x_adv, like x: a misclassified point, else that with the largest margin.
    Raises: BadInput. Source: Croce & Hein 2020.
    """
    check_attack(x, y, eps, norm)
    x_adv, logits = x.clone(), exact_logits(model, x)
    ranking = logits.scatter(1, y[:, None], -math.inf).topk(min(targets, logits.shape[1] - 1), 1)
    best = torch.full_like(logits[:, 0], -math.inf)  # margin of x_adv; above 0 it has fallen
    for target in ranking.indices.T:  # (N,): every image's next likeliest class
        rows = (best <= 0).nonzero()[:, 0]
        if not len(rows):
            break
        found = apgd(model, x[rows], y[rows], eps, steps, norm=norm, generator=generator,
                     loss=partial(dlr, target=target[rows]))  # fmt: skip
        logits = exact_logits(model, found)
        reached = margin(logits, y[rows]).where(logits.isfinite().all(1), math.inf)
        better = reached > best[rows]
        x_adv[rows[better]], best[rows[better]] = found[better], reached[better]
    return x_adv


def square_side(done, height, width):
    """Side of square's window, in pixels, when a share `done` of the queries is spent."""
    halvings = sum(done > at for at in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))  # area
    side = round(math.sqrt(0.8 / 2**halvings * height * width))
    return min(max(side, 1), height, width)


@torch.no_grad()
def square(model, x, y, eps, queries=5000, *, norm="linf", generator=None):
    """(E29) Square attack: random search on the margin that looks at logits only, at no gradient.

    It begins with vertical stripes. Each query repaints a random square window with colours at the
    border of the l_inf ball and is kept if the margin grew. The window shrinks from 80% of the
    image to 0.2% by a fixed schedule. Where PGD fails only because gradients mislead, this works.

    Args: queries, the most that are spent on an image; it leaves the batch when it falls. All
        images see the same windows and signs. norm: "linf" (the authors' l_2 form is left out).
    Returns: x_adv, like x. Raises: BadInput. Source: Andriushchenko et al. 2020, section 3.
    """
    check_attack(x, y, eps, norm)
    if norm != "linf":
        raise BadInput("square attacks in linf only: take apgd-t for l2")
    c, h, w = x.shape[1:]
    draw = dict(generator=generator, device=x.device)
    corners = torch.rand(queries, 2, **draw).tolist()
    colours = torch.rand(queries, c, 1, 1, **draw).sub(0.5).sign().to(x.dtype) * eps
    stripes = torch.rand(c, 1, w, **draw).sub(0.5).sign().to(x.dtype) * eps
    x_adv = candidate = (x + stripes).clamp(0, 1)
    found, rows = x_adv.clone(), torch.arange(len(x), device=x.device)
    best = x.new_full((len(x),), -math.inf, dtype=torch.float32)
    with attack_mode(model):
        for query in range(queries):
            if query:
                side = square_side(query / queries, h, w)
                top, left = (int(at * (n - side + 1)) for at, n in zip(corners[query], (h, w)))
                window = ..., slice(top, top + side), slice(left, left + side)
                candidate = x_adv.clone()
                candidate[window] = (x[window] + colours[query]).clamp(0, 1)
            logits = model(candidate)
            reached, stands = margin(logits, y), is_right(logits, y)
            x_adv = choose((reached > best) | ~stands, candidate, x_adv)
            best = reached.maximum(best)
            found[rows] = x_adv
            rows, x, y, x_adv, best = (t[stands] for t in (rows, x, y, x_adv, best))
            if not len(rows):
                break
    return found


def pgd_to_class(model, x, y, eps, steps=10, *, pick="least", generator=None, **options):
    """PGD towards another class: the "least" likely one, or a "random" one for each class."""
    check_attack(x, y, eps, options.get("norm", "linf"))
    logits = exact_logits(model, x)
    if pick == "least":
        target = logits.scatter(1, y[:, None], math.inf).argmin(1)
    else:
        k = logits.shape[1]
        away = torch.randint(1, k, (k,), generator=generator, device=x.device)
        target = (y + away[y]) % k
    options |= dict(loss=lambda logits, _: -cross_entropy(logits, target), generator=generator)
    return pgd(model, x, y, eps, steps, **options)


ATTACKS = {
    "fgsm": partial(fgsm),
    "rs-fgsm": partial(rs_fgsm),
    "n-fgsm": partial(n_fgsm),  # leaves the ball, so it hardly ever counts
    "pgd": partial(pgd, steps=20),
    "pgd-margin": partial(pgd, steps=20, loss=margin),
    "pgd-dlr": partial(pgd, steps=20, loss=dlr),
    "pgd-kl": partial(kl_pgd, steps=20),
    "energy-down": partial(pgd, steps=20, loss=likelier),
    "energy-up": partial(apgd, steps=40, loss=fooling_and_unlikely, until_fooled=False),
    "pgd-t-random": partial(pgd_to_class, steps=20, pick="random"),
    "pgd-t-least": partial(pgd_to_class, steps=20),
    "apgd-ce": partial(apgd, steps=100),
    "apgd-dlr": partial(apgd, steps=100, loss=dlr),
    "apgd-t": partial(apgd_t, steps=100),
    "square": partial(square, queries=5000),
}
SUITES = {
    "quick": ["fgsm", "pgd", "pgd-margin"],
    "standard": ["apgd-ce", "apgd-t", "square"],  # AutoAttack without FAB-T
    "energy": [name for name in ATTACKS if name not in ("n-fgsm", "apgd-dlr", "square")],
    "all": list(ATTACKS),
}


def attacks_of(suite, norm="linf"):
    """The names in a suite, or in a list of names. Raises: BadInput for what that norm lacks."""
    known = [name for name in ATTACKS if norm == "linf" or name != "square"]
    if isinstance(suite, str):
        check_choice("suite", suite, SUITES)
        return [name for name in SUITES[suite] if name in known]
    for name in suite:
        check_choice(f"attack in {norm}", name, known)
    return suite


@torch.no_grad()
def robust_accuracy(model, x, y, eps, suite="standard", norm="linf", *, seed=0, batch_size=500,
                    restarts=1, steps=None, queries=None, on_progress=None):  # fmt: skip
    """(E30) Accuracy under the worst of several attacks, image by image, and their energies.

    An image has fallen when it is misclassified, or when an attack has found a point in its ball
    and in [0, 1] that is misclassified. The suite "standard", AutoAttack without FAB-T (which
    changed 0 of 600 images) and, in l2, without Square, attacks only what still stands: its rows
    speak of ever fewer images. In the others all attacks see all images: energies can be compared.

    Args:
        model, x, y, eps, norm: as for fgsm; the model on the images' device.
        suite: a name of SUITES, or a list of names of ATTACKS.
        restarts: how often an attack with a random start is tried on what it left standing.
        steps, queries: for the attacks that have them.
        on_progress: called as (rows so far, attack, images done, images in all) after every batch.
    Returns: dict: clean_acc, robust_acc; x_adv (N, C, H, W), where an image fell, else x; fallen
        (N,); rows, natural images first, the dicts of `describe` and: worst, the robust accuracy of
        ALL images so far; outside, those wrong but out of the ball; gradients, queries per image.
    Raises: BadInput. Source: Croce & Hein 2020 (worst case); Mirza et al. 2024 (energies).
    """
    check_attack(x, y, eps, norm)
    names = attacks_of(suite, norm)
    settings = {k: v for k, v in {"steps": steps, "queries": queries}.items() if v is not None}
    for name, value in (settings | {"batch_size": batch_size, "restarts": restarts}).items():
        if value < 1:
            raise BadInput(f"{name} must be at least 1, not {value}")
    began, cost = time.perf_counter(), {"gradients": 0, "queries": len(x)}

    def count(_, inputs):
        """Counts the images that pass through the model, with a gradient or without."""
        cost["gradients" if torch.is_grad_enabled() else "queries"] += len(inputs[0])

    def about(outside=0):
        """What a row says of the search, beside `describe`."""
        per_image = {k: v / len(chosen) for k, v in cost.items()}
        worst_case = {"worst": 1 - fallen.double().mean().item(), "outside": outside}
        return worst_case | per_image | {"seconds": time.perf_counter() - began}

    clean = check_model(model, x, y, names)
    fallen, worst, chosen = ~is_right(clean, y), x.clone(), torch.arange(len(x), device=x.device)
    rows = [describe("natural", clean, clean, x, x, y) | about()]
    net = nn.Sequential(model)  # around it, since TorchScript takes no hooks
    net.register_forward_pre_hook(count)
    for name in names:
        began, cost["gradients"], cost["queries"] = time.perf_counter(), 0, 0
        own = {k: v for k, v in settings.items() if k in ATTACKS[name].keywords}
        own |= dict(norm=norm, generator=torch.Generator(x.device).manual_seed(seed))
        if suite == "standard":
            chosen = (~fallen).nonzero()[:, 0]
        if not len(chosen):
            break
        told = partial(on_progress, rows, name) if on_progress else None
        parts = x[chosen], y[chosen], eps, batch_size, restarts, told
        x_adv = attack_in_batches(name, net, *parts, **own)
        logits = exact_logits(model, x_adv)
        wrong = ~is_right(logits, y[chosen])
        inside = (project(x_adv, x[chosen], eps, norm) - x_adv).flatten(1).abs().amax(1) < 2e-6
        fell = wrong & inside & ~fallen[chosen]
        worst[chosen[fell]], fallen[chosen[fell]] = x_adv[fell], True
        row = describe(name, clean[chosen], logits, x[chosen], x_adv, y[chosen])
        rows.append(row | about(outside=int((wrong & ~inside).sum())))
    found = {"clean_acc": rows[0]["worst"], "robust_acc": rows[-1]["worst"], "rows": rows}
    return found | {"x_adv": worst, "fallen": fallen}


def attack_in_batches(name, model, x, y, eps, batch_size, restarts, told, **options):
    """x* of images by one of ATTACKS; `told`, if any, is called as (images done, images in all)."""
    x_adv, done = x.clone(), 0
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        done += len(rows)
        for attempt in range(restarts if name != "fgsm" else 1):
            if attempt:  # only on what still stands; to ask that counts among the queries
                rows = rows[is_right(exact_logits(model, x_adv[rows]), y[rows])]
            if not len(rows):
                break
            with true_fp32():
                x_adv[rows] = ATTACKS[name](model, x[rows], y[rows], eps, **options)
        if told:
            told(done, len(x))
    return x_adv


def describe(name, logits, logits_adv, x, x_adv, y):
    """How attacked images fared: n, accuracy, means of energies and distances, and each E(x*)."""
    moved, finite = (x_adv - x).flatten(1), logits_adv.isfinite().all(1)
    means = {
        "energy": energy_x(logits_adv), "delta_energy": delta_energy(logits, logits_adv),
        "delta_energy_xy": delta_energy(logits, logits_adv, y),
        "cross_entropy": cross_entropy(logits_adv, y),
        "linf": moved.abs().amax(1), "l2": moved.norm(dim=1),
    }  # fmt: skip
    row = {"attack": name, "n": len(x), "nonfinite": int((~finite).sum())}
    row |= {"accuracy": is_right(logits_adv, y).double().mean().item()}
    row |= {k: v[finite].mean().item() for k, v in means.items()}  # others have no energy
    return row | {"energies": energy_x(logits_adv)[finite].cpu()}


def check_model(model, x, y, names=("square",)):
    """The clean logits, fp32 (N, K). Raises BadInput where model, images and attacks do not fit."""
    if not len(x):
        raise BadInput("no images to attack")
    trouble = f"the model does not take images of shape {tuple(x.shape[1:])} in any batch size"
    try:
        logits = exact_logits(model, x)
        exact_logits(model, x[:1])  # what has fallen leaves the batch: one image may remain
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise BadInput(f"a classifier gives logits (N, K), K >= 2, not {tuple(logits.shape)}")
        if not logits.isfinite().all():
            raise BadInput("the model gives NaN or infinite logits on clean images")
        if not 0 <= y.min() <= y.max() < logits.shape[1]:
            raise BadInput(f"labels {y.min()}..{y.max()}, the model has {logits.shape[1]} classes")
        if set(names) - {"square"}:
            trouble = "gradient attacks cannot run, --attacks square can"
            with attack_mode(model):
                gradient_of(model, x[:2], y[:2], cross_entropy)
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a stranger's model raises
        raise BadInput(f"{trouble}: {' '.join(str(error).split())[:300]}") from error
    return logits


@torch.no_grad()
def masking_signs(model, x, y, eps, norm="linf", rows=(), most=200):
    """Reasons to distrust a robust accuracy: a list of sentences, empty if nothing was noticed.

    Gradients that lead nowhere make a model LOOK robust. Tried on `most` of the images; rows are
    those of robust_accuracy. Source: Athalye et al. 2018; Carlini et al. 2019, section 4.
    """
    some = evenly(most, len(x)).to(x.device)
    x, y = x[some], y[some]
    logits = exact_logits(model, x)
    again = exact_logits(model, x) - logits
    alone = exact_logits(model, x[:20], 1) - logits[:20]
    again, alone = (d.abs().max() > 0.01 * logits.abs().max() for d in (again, alone))
    sums_to_one = (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3
    broken = sum(row["nonfinite"] for row in rows)
    drop = max([before["worst"] - row["worst"] for before, row in zip(rows, rows[1:])
                if row["attack"] == "square" and before["gradients"] > 1], default=0)  # fmt: skip
    signs = [  # (noticed?, what to say)
        (again, "Asked twice, the model gives other logits (dropout left on?): results vary."),
        (alone and not again, "Alone, an image gets other logits than in a batch: results vary."),
        (broken, f"{broken} attacked points have NaN or infinite logits: they count as fallen."),
        (sums_to_one or energy_x(logits).abs().max() < 1e-3, "The model ends in softmax or"
         " log-softmax: gradients shrink and energies mean nothing; give the logits before it."),
        (drop > 0.01, f"Square, gradient-free, broke {drop:.1%} more: gradients may be masked."),
    ]  # fmt: skip
    try:
        check_model(model, x, y, ["pgd"])
    except BadInput as error:  # Square alone can attack such a model
        return [sentence for noticed, sentence in signs if noticed] + [f"Beware: {error}."]
    with attack_mode(model):
        gradient = gradient_of(model, x, y, cross_entropy)[1]
    flat = (gradient.flatten(1) == 0).all(1).double().mean().item()
    far = 0.5 if norm == "linf" else 0.5 * x[0].numel() ** 0.5  # reaches grey from anywhere

    def left(attack, size):
        """Accuracy that an attack of that size leaves."""
        generator = torch.Generator(x.device).manual_seed(0)
        x_adv = attack(model, x, y, size, norm=norm, generator=generator)
        return is_right(exact_logits(model, x_adv), y).double().mean().item()

    one, many, grey = left(fgsm, eps), left(pgd, eps), left(pgd, far)
    signs += [
        (flat > 0.1, f"The gradient is exactly zero for {flat:.0%} of the images: a dead end."),
        (one < many - 0.02, f"FGSM leaves {one:.1%}, ten steps {many:.1%}: gradients mislead."),
        (catastrophic_overfitting(many, one, one), f"FGSM leaves {one:.1%} right but PGD-10 only"
         f" {many:.1%}: catastrophic overfitting; accuracy under FGSM says nothing here."),
        (grey > 0.1, f"PGD with eps {far:.3g}, enough to turn every image grey, leaves {grey:.1%}"
         " right: the attack does not work on this model."),
    ]  # fmt: skip
    return [sentence for noticed, sentence in signs if noticed]


# ==== 12. Judging pictures: metrics for generated images ==========================================
#
# Good pictures look like real ones to a JUDGE, a network that did not make them, and are not copies
# of training images. Each function takes tensors only: features (N, F), probabilities (N, K).


def judge_images(judge, x, batch_size=500):
    """What a judge sees in images: penultimate features (N, F) and probabilities (N, K).

    The features are what its last linear layer is given, caught there by a hook, so that any
    classifier that has one can be a judge. Args: x (N, C, H, W), uint8 or float in [0, 1].
    Raises: BadInput.
    """
    linear, features = [m for m in judge.modules() if isinstance(m, nn.Linear)], []
    if not linear:
        raise BadInput("a judge needs a linear layer: what its last one is given are the features")
    with linear[-1].register_forward_pre_hook(lambda _, given: features.append(given[0].float())):
        probabilities = exact_logits(judge, x, batch_size).softmax(1)
    return torch.cat(features), probabilities


def inception_score(probabilities, splits=10):
    """(E31) IS = exp(mean_x KL(p(y|x) || p(y))), p(y) = mean_x p(y|x): from 1 to K, high is good.

    Args: probabilities (N, K); splits: mean and std over that many parts, shuffled by a fixed seed
        (consecutive parts of images sorted by class would hold one class each).
    Returns: (mean, std). Raises: BadInput. Source: Salimans et al. 2016.
    """
    if not 1 <= splits <= len(probabilities):
        raise BadInput(f"cannot make {splits} splits of {len(probabilities)} images")
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(0))
    scores = []
    for rows in order.tensor_split(splits):
        p = probabilities[rows.to(probabilities.device)].cpu().double()  # MPS has no float64
        log_ratio = p.clamp_min(1e-30).log() - p.mean(0).clamp_min(1e-30).log()
        scores.append((p * log_ratio).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def frechet_distance(a, b):
    """(E32) FD = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), between two sets of features.

    m and C are mean and covariance. With A the centred features over sqrt(n - 1), C_a = A^T A, and
    the eigenvalues of (C_a C_b)^(1/2) are the singular values of A B^T. So no matrix square root is
    needed; where n > F, A is first replaced by the (F, F) triangle R of A = Q R. With Inception's
    features this is FID. Falls with n: compare only at equal n.

    Args: a (n, F), b (m, F); computed in float64. Returns: float >= 0. Raises: BadInput.
    Source: Dowson & Landau 1982; Heusel et al. 2017.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise BadInput(f"need two sets (n >= 2, F), not {tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise BadInput("features hold NaN or infinite values")
    roots, means = [], []
    for t in (a.cpu().double(), b.cpu().double()):  # MPS has no float64
        means.append(t.mean(0))
        root = (t - means[-1]) / math.sqrt(len(t) - 1)
        roots.append(torch.linalg.qr(root, mode="r").R if len(t) > t.shape[1] else root)
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = (roots[0] ** 2).sum() + (roots[1] ** 2).sum() - 2 * cross
    return max(0.0, ((means[0] - means[1]).square().sum() + spread).item())


def nearest_distance(a, b, batch_size=1000):
    """Distance of each row of a to its nearest in b: (N, F), (M, F) -> distances (N,), rows (N,).

    Found by the fast |a|^2 + |b|^2 - 2ab, then computed exactly: a copy has distance 0.
    """
    mean = b.mean(0)  # subtracted, since far from 0 the fast form cancels
    nearest = torch.cat([torch.cdist(p - mean, b - mean).argmin(1) for p in a.split(batch_size)])
    return (a - b[nearest]).norm(dim=1), nearest


def precision_recall(real, fake, k=3, batch_size=1000):
    """(E33) Improved precision and recall: how real the fakes are, how much of the real they cover.

    Around each image of a set a ball reaches to its k-th nearest of the same set. Precision: share
    of fakes within any real ball; recall: share of real images within any fake ball.
    Args: real (N, F), fake (M, F), features. Returns: (precision, recall) in [0, 1].
    Raises: BadInput. Source: Kynkaanniemi et al. 2019.
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise BadInput(f"k {k} needs more than {k} images, not {len(real)} and {len(fake)}")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise BadInput("features hold NaN or infinite values")
    mean = real.mean(0)  # subtracted, since torch.cdist cancels far from 0
    real, fake = real - mean, fake - mean

    def covered(points, centres):
        """Share of the points within any ball around the centres."""
        radii = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values  # the 1st is itself
                           for part in centres.split(batch_size)])  # fmt: skip
        inside = [(torch.cdist(p, centres) <= radii).any(1) for p in points.split(batch_size)]
        return torch.cat(inside).float().mean().item()

    return covered(fake, real), covered(real, fake)


def class_agreement(probabilities, y):
    """(E34) Share of images whose class the judge recognises: (N, K), (N,) -> float in [0, 1]."""
    return (probabilities.argmax(1) == y).float().mean().item()


# ==== 13. Settings ================================================================================


def opt(default, note, low=None, high=1e9):
    """A field of Config: its default, its note, and the least and most it may be."""
    return dataclasses.field(default=default, metadata={"note": note, "low": low, "high": high})


@dataclass
class Config:
    """Every setting of a training run, with the default of the demonstration (shapes, FGSM).

    Skip it on first reading: each name is explained where it is used. `recipe` gives the defaults
    that suit another data set or method. All values are plain Python, so that a checkpoint can
    store them and be read without running any code. The notes and groups are those of --help, too.
    """

    # fmt: off
    # Data
    dataset: str = opt("shapes", "shapes, cifar10, cifar100, svhn, mnist, fashion-mnist, FILE.npz,"
                       " or a FOLDER with train/ and test/")
    data_dir: str = opt("data", "where torchvision's data sets lie or are downloaded to")
    limit: int = opt(0, "train on that many images, stratified; 0 = all", 0)
    val_fraction: float = opt(0.1, "share of train held out, to choose 'best' on", 0)
    augment: Literal["none", "crop", "crop-flip"] = opt("none", "crops are padded by side / 8")
    # Model
    model: Literal[MODELS] = opt("small", "small is for CPUs")
    width: int = opt(16, "channels of the first stage of the small model", 8, 512)
    # Method
    method: Literal[tuple(METHODS)] = opt("fgsm", "how the network is trained")
    eps: float = opt(20 / 255, "radius of the attack's ball; write 8/255", 1e-6)
    eps_warmup: float = opt(3.0, "epochs over which eps grows linearly from 0", 0)
    norm: Literal["linf", "l2"] = opt("linf", "how the ball is measured")
    attack_steps: int = opt(10, "steps of the training attack (multi-step methods)", 1)
    attack_step: float = opt(0.0, "its step size, in [0, 1] pixels; 0: eps / 4", 0)
    attack_bn: Literal["train", "eval"] = opt("train", "BatchNorm inside the training attack")
    method_beta: float = opt(6.0, "weight of the KL term of trades, mart and weat", 0)
    # Regularizers
    der: bool = opt(False, "add the Delta Energy Regularizer")
    beta: float = opt(1.5, "weight of DER, in loss per nat of delta energy; it need not grow with"
                      " eps (on AAEs .5 to 1 served from 8 to 20/255)", 0)
    gamma: float = opt(0.0, "delta energy that DER leaves alone, in nats", 0)
    der_on: Literal["all", "abnormal"] = opt("all", "which images DER presses: all, or AAEs")
    der_from: float = opt(0.0, "share of the epochs after which DER is on", 0, 0.999)
    der_ramp: float = opt(0.7, "share of the epochs over which beta then grows; 0: at once", 0)
    grad_align: float = opt(0.0, "weight of GradAlign; 0 = off", 0)
    awp: float = opt(0.0, "gamma of adversarial weight perturbation; 0 = off", 0)
    awp_warmup: int = opt(0, "epochs before AWP begins", 0)
    # Optimisation
    epochs: int = opt(20, "passes over the training images", 1)
    batch_size: int = opt(64, "images per step, over all processes", 2)  # 1: no batch statistics
    lr: float = opt(0.2, "highest learning rate of SGD", 1e-9)
    schedule: Literal["triangular", "piecewise", "cosine", "constant"] = opt("triangular", "of lr")
    lr_peak: float = opt(0.4, "share of the epochs at which triangular peaks", 0.001, 0.999)
    lr_drops: str = opt("0.5,0.75", "shares of the epochs at which piecewise falls to a tenth")
    momentum: float = opt(0.9, "momentum of SGD", 0, 0.999)
    weight_decay: float = opt(5e-4, "L2 penalty of SGD, on every parameter", 0)
    # Overfitting
    on_overfit: Literal["continue", "stop", "rollback", "der"] = opt("continue", "at an alarm;"
        " rollback: to the best epoch, and stop; der: from there a whole run with DER")
    probe_size: int = opt(400, "validation images measured every epoch; half of test, a quarter of"
                          " train", 1)
    test_size: int = opt(0, "test images that judge last and best; 0 = all", 0)
    # Machine
    seed: int = opt(0, "weights, order, augmentation and noise follow from it", 0, 2**32 - 1)
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    threads: int = opt(0, "CPU threads; 0: one for the small model, else all cores", 0, 1024)
    precision: Literal["auto", "bf16", "fp32"] = opt("auto", "auto: bf16 where the hardware has it;"
        " fp32: TF32 on GPUs that have it")
    compile: bool = opt(False, "run the network through torch.compile")
    # fmt: on


HISTORY = [  # of history.csv; on test images, but for train_... and val_...; energies in nats
    "epoch", "lr", "train_loss", "clean_acc", "fgsm_acc", "pgd_acc", "val_pgd_acc",
    "energy", "delta_energy_fgsm", "delta_energy_pgd", "abs_delta_energy_pgd",
    "train_delta_energy_pgd", "verdict", "seconds", "val_fgsm_acc", "val_delta_energy_pgd",
    "probe_seconds", "fgsm_aae", "val_fgsm_aae", *TRACKED,
]  # fmt: skip


PRESETS = {
    # Few images, many epochs, a learning-rate drop: what RO needs (Rice et al. 2020).
    # With --der the paper's beta and gamma from the first drop on; at .8 little is left to save.
    "ro": dict(dataset="shapes", method="pgd", limit=200, width=32, eps=12 / 255, eps_warmup=0.0,
               attack_steps=5, batch_size=50, lr=0.1, schedule="piecewise", epochs=80,
               probe_size=200, test_size=1000, beta=6.0, gamma=0.2, der_from=0.5, der_ramp=0.0),
}  # fmt: skip


def recipe(dataset="shapes", method="fgsm", **given):
    """The Config that suits a data set and a method; `given` settings override it.

    On shapes Config's defaults are the demonstration. Elsewhere eps is 8/255, and
        single-step methods: Wong et al. 2020 (30 epochs, triangular to .2); SVHN: de Jorge et al.
            2022 (lr .05, eps growing for 5 epochs); GradAlign: its authors' lr .3;
        pgd, none: Rice et al. 2020 (200 epochs, .1 falling at 50% and 75%; SVHN .01, step 1/255);
        trades, mart, weat: their authors' epochs, drops, weight decay, and attack in eval mode.
    In l_2 eps is 128/255 everywhere. DER is the paper's, but not on shapes: there all images and a
    beta that grows, to 1.5 for single-step methods (RS-FGSM: sooner), to .5 for the others, kept
    more robustness (tutorials/results/README.md). Raises: BadInput.
    """
    check_choice("method", method, METHODS)
    for name in given:
        check_choice("setting", name, vars(Config()))
    svhn, wide = dataset == "svhn", str(given.get("model")).startswith("wrn")
    single_step, usual = METHODS[method].attack in SINGLE_STEP, {}
    if dataset == "shapes" and method == "rs-fgsm":  # over .7 one seed of five collapses
        usual |= dict(der_ramp=0.3)
    if dataset != "shapes":
        # Mirrored only where that is known to do no harm: a mirrored digit is another sign.
        mirrored = dataset in ("cifar10", "cifar100")
        usual |= dict(model="preactresnet18", eps=8 / 255, eps_warmup=0.0, epochs=30, lr_peak=0.5,
                      batch_size=128, probe_size=1000,
                      val_fraction=0.02 if dataset in DATASETS else 0.1,  # published: none
                      augment="crop-flip" if mirrored else "crop")  # fmt: skip
        if single_step:  # the paper's DER against collapse: on abnormal images, from the start
            usual |= dict(beta=0.1 if method == "n-fgsm" else 0.5, der_on="abnormal", der_ramp=0.0)
            if svhn:
                usual |= dict(lr=0.05, eps_warmup=5.0)
            elif given.get("grad_align"):
                usual |= dict(lr=0.3)
        else:
            usual |= dict(epochs=200, lr=0.1, schedule="piecewise")
            usual |= dict(lr=0.01, attack_step=1 / 255) if svhn else {}
        if method == "trades":
            usual |= dict(epochs=76, lr_drops="0.98684", weight_decay=2e-4)  # 75 of 76
            usual |= dict(awp_warmup=10) if given.get("awp") else {}
        if method == "mart":
            usual |= dict(epochs=120, lr_drops="0.625,0.75,0.833")
            usual |= dict(weight_decay=7e-4) if wide else dict(lr=0.01, weight_decay=3.5e-3)
        if method.startswith("weat"):
            usual |= dict(epochs=100, lr_drops="0.75,0.9")
    if METHODS[method].needs_clean:
        usual |= dict(attack_bn="eval", method_beta=5.0 if method == "mart" else 6.0)
    if not single_step and method != "none":
        late = dict(beta=6.0, gamma=0.2, der_from=0.8, der_ramp=0.0)  # the paper's, on all images
        usual |= dict(beta=0.5) if dataset == "shapes" else late
    if given.get("norm") == "l2":
        usual |= dict(eps=128 / 255)  # 20/255 and 8/255 would be next to nothing
        usual |= dict() if single_step else dict(attack_step=15 / 255)
    config = Config(**{"dataset": str(dataset), "method": method} | usual | given)
    if "eps_warmup" not in given:
        config.eps_warmup = min(config.eps_warmup, max(config.epochs, 0) / 4)
    check_config(config)
    return config


def check_config(config):
    """Refuses settings that cannot work, with what to do instead. Raises: BadInput."""
    for f in dataclasses.fields(Config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if choices := typing.get_args(f.type):
            check_choice(f.name, value, choices)
        elif low is not None and not low <= value <= high:
            raise BadInput(f"{f.name} must lie in {low:g} .. {high:g}, not {value}")
    if config.norm == "linf" and config.eps > 1:
        hint = f": did you mean {config.eps:g}/255?" if config.eps < 256 else ", such as 8/255"
        raise BadInput(f"eps {config.eps:g} must be at most 1, in units of [0, 1]{hint}")
    share = r" *0?\.0*[1-9]\d* *"
    if not re.fullmatch(f"{share}(,{share})*", config.lr_drops):
        raise BadInput("lr_drops are shares of the epochs, such as 0.5,0.75")
    if config.eps_warmup >= config.epochs:
        raise BadInput(f"eps_warmup {config.eps_warmup:g} never ends within {config.epochs} epochs")
    if config.compile and config.grad_align:
        raise BadInput("grad_align needs second derivatives, which torch.compile lacks: drop one")
    if config.method == "none" and (config.der or config.awp or config.on_overfit != "continue"):
        raise BadInput("method 'none' makes no adversarial images: der, awp, on_overfit need some")


# ==== 14. Errors, checkpoints, devices, several processes =========================================


class BadInput(ValueError):
    """An argument that cannot be used; the message says what is wrong and what to do instead."""


class RunError(RuntimeError):
    """Something failed while running (a file, a device, a diverged loss); the message says what."""


def check_choice(kind, value, choices):
    """Raises BadInput for a `value` that is not among `choices`; it names the nearest one."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "choose from " + ", ".join(choices)
        raise BadInput(f"unknown {kind} '{value}': {hint}")


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint, which is whole at every moment. Raises: RunError; an older one stays."""
    partial_path = f"{path}.{os.getpid()}.partial"  # each process its own: two may make one cache
    if "model" in checkpoint:  # our weights lie channels-last, which safetensors refuses
        model = {k: v.contiguous() for k, v in checkpoint["model"].items()}
        checkpoint = {**checkpoint, "model": model}
    try:
        torch.save(checkpoint, partial_path)
        os.replace(partial_path, path)
    except (OSError, RuntimeError) as error:
        kept = "; the older one is kept" * os.path.isfile(path)
        raise RunError(f"cannot save '{path}' (disk full or not writable?){kept}") from error
    finally:
        with contextlib.suppress(OSError):  # where the disk is full, give back what was taken
            os.remove(partial_path)


def alike(saved, like):
    """Whether `saved` has the types of `like`, all the way down; lists, those of its first one."""
    if isinstance(like, dict) and isinstance(saved, dict):
        return all(k in saved and alike(saved[k], like[k]) for k in like)
    if isinstance(like, (list, tuple)) and isinstance(saved, (list, tuple)):
        return all(alike(v, like[0]) for v in saved if like)
    return type(saved) in ((int, float) if isinstance(like, float) else (type(like),))


def check_parts(checkpoint, size):
    """Raises an error of any kind for odd types, or a network that `size` bytes cannot hold."""
    usual = {k: v for k, v in vars(Config()).items() if k in checkpoint.get("config", {})}
    like = {"config": usual, "epoch": 0, "classes": [""], "training": {}}
    if not alike(checkpoint, {k: v for k, v in like.items() if k in checkpoint}):
        raise TypeError
    spec, weights = checkpoint.get("spec"), checkpoint.get("model")
    if spec is None:  # no network, or one that make_model does not know
        return
    stored = sum(v.detach().numpy().nbytes for v in weights.values())  # refuses all but plain ones
    if max(stored, spec["num_classes"], spec["in_channels"], spec["width"]) > size:
        raise ValueError
    with torch.device("meta"):  # shapes without memory, whatever a spec asks for
        network = make_model(**spec)
    network.load_state_dict(weights, assign=True)


def load_checkpoint(path):
    """Reads a checkpoint of `train`: state_dicts and plain values only, never code.

    Raises: RunError when the file is missing, damaged, hostile or not one of ours.
    """
    if not os.path.isfile(path):  # a pipe would make us wait for ever
        raise RunError(f"no checkpoint '{path}', or no regular file")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself ignores the checksums
            size = sum(part.file_size for part in archive.infolist())
            if size > os.path.getsize(path) or archive.testzip():  # torch packs nothing
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # no code is run
        if checkpoint.get("format") != "ebm-at 1":
            raise ValueError("no format 'ebm-at 1'")
        check_parts(checkpoint, size)
        return checkpoint
    except Exception as error:  # torch.load raises a dozen kinds on a damaged file
        why = "damaged, not a checkpoint of this project, or not of plain tensors that fit its spec"
        raise RunError(f"'{path}' is not loaded ({error!r:.60}): {why}") from error


def load_model(path, device="cpu"):
    """The model of a checkpoint, in eval mode, and the checkpoint. Raises: RunError."""
    checkpoint = load_checkpoint(path)
    if checkpoint.get("spec") is None:
        raise RunError(f"'{path}' lacks a model of make_model: load its ['model'] into your own")
    model = make_model(**checkpoint["spec"])
    model.load_state_dict(checkpoint["model"])
    if not all(v.isfinite().all() for v in model.state_dict().values()):
        raise RunError(f"'{path}' holds NaN or infinite weights: its training diverged")
    return model.to(device).eval(), checkpoint


STATE = ("epoch", "history", "alarms", "stopped", "restarted", "best")  # of a Trainer


def run_state(run):
    """All that a resume needs beside the config, as plain values and tensors."""
    return {k: getattr(run, k) for k in STATE} | {
        "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
        "epochs": run.config.epochs, "der_from": run.config.der_from, "data": checksum(run.data),
    }  # fmt: skip


def save_run(run, folder):
    """last.pt: the model and all that a resume needs; best.pt: the model of the best epoch."""
    if folder is None or world()[0] > 0:  # only one process writes
        return
    about = {"format": "ebm-at 1", "spec": getattr(run.model, "spec", None),
             "classes": run.data.classes, "config": dataclasses.asdict(run.config)}  # fmt: skip
    last = {"epoch": run.epoch, "model": run.model.state_dict(), "training": run_state(run)}
    best = {"epoch": run.best["epoch"], "model": run.best["weights"]}
    save_checkpoint(os.path.join(folder, "last.pt"), about | last)
    save_checkpoint(os.path.join(folder, "best.pt"), about | best)


def restore_run(run, saved):
    """Takes up a run where its last.pt left it. Raises: RunError, BadInput."""
    row = dict.fromkeys(HISTORY, 0.0) | {"epoch": 0, "verdict": ""}
    alarm = {"verdict": "", "epoch": 0, "reason": "", "action": "", "der": False}
    try:
        whole = alike(saved, run_state(run) | {"history": [row], "alarms": [alarm]})
        if not (whole and 0 <= saved["restarted"] <= saved["epoch"] == len(saved["history"])):
            raise ValueError
        for weights in (saved["best"]["weights"], saved["model"]):  # a rescue may ask for the best
            run.model.load_state_dict(weights)
        run.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        [kept["momentum_buffer"].view_as(p) for p, kept in run.optimizer.state.items()]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RunError("the checkpoint does not fit this run: not resumed") from error
    if saved["data"] != checksum(run.data):
        raise RunError("the training images are not those the run began with: not resumed")
    if saved["epoch"] == saved["epochs"] < run.config.epochs:
        raise BadInput(f"that run ended at epoch {saved['epoch']}: start a new one to train longer")
    if saved["restarted"]:  # a rescue has switched DER on and made the run longer
        run.config.der, run.config.epochs = True, saved["epochs"]
        run.config.der_from = saved["der_from"]
    vars(run).update(copy.deepcopy({k: saved[k] for k in STATE}))


def pick_device(name="auto"):
    """The torch.device called `name`; auto: a CUDA GPU where there is one. Raises: RunError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_initialized():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # raises on "meta", too, which computes nothing
    except Exception as error:  # each backend that is missing raises a kind of its own
        raise RunError(f"device '{name}' is not there; try --device cpu") from error
    return device


def pick_precision(name, device):
    """The torch dtype that training's convolutions run in: bfloat16 or float32.

    bf16 keeps the exponent range of fp32, so gradients do not underflow and no loss scaling is
    needed. A CPU without bf16 instructions emulates it slowly, hence "auto".
    """
    if name == "auto":
        if device.type == "cpu":
            told = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may not tell
            fast = told.get("avx512_bf16")
        else:
            fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if fast else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(device, dtype):
    """A context in which convolutions and matrix products run in `dtype`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextlib.contextmanager
def true_fp32():
    """Switches off what rounds fp32 products to 10 bits or fewer (TF32), and back on at the end."""
    of = torch.backends  # the older allow_tf32 raises once a caller has used these switches
    with contextlib.ExitStack() as at_the_end:
        for kind in (of.cudnn.conv, of.cuda.matmul, of.mkldnn.conv, of.mkldnn.matmul):
            at_the_end.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
            kind.fp32_precision = "ieee"
        yield


# Several processes (torchrun) share one global batch: all draw the same order of the images, each
# keeps its own rows and draws noise of its own, and gradients are averaged. On GPUs BatchNorm sees
# the global batch; on CPUs each process sees its own rows, so N processes are not exactly one.


def start_processes(device="auto"):
    """Joins what torchrun started; a process started by hand stays alone. Raises: RunError."""
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return
    gpu = torch.cuda.is_available() and device in ("auto", "cuda")
    try:
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpu else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:  # no torchrun, odd numbers, a port in use
        hint = f"start with torchrun, or unset WORLD_SIZE ({str(error)[:150]})"
        raise RunError(f"there are no other processes to join: {hint}") from error


def world():
    """(rank of this process, number of processes); (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def process_weight(chosen):
    """What this process's mean over its `chosen` images (N,) counts in that over all processes'."""
    own = chosen.sum().float()
    return own / mean_over_processes([own.clone()])[0].clamp_min(1e-9)


def of_first_process(numbers, device):
    """The dict of numbers that the process of rank 0 has."""
    if not dist.is_initialized():
        return numbers
    values = torch.tensor(list(numbers.values()), device=device, dtype=torch.float64)
    dist.broadcast(values, 0)
    return dict(zip(numbers, values.tolist()))


def mean_over_processes(tensors):
    """Each tensor replaced by its mean over all processes, in place, in one message."""
    if dist.is_initialized():
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t) / world()[1])
    return tensors
