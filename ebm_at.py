"""Adversarial training seen through energies: the whole idea in one file, to be read from the top.

A classifier with logits f(x) is also an energy-based model. Write E(x, y) = -f(x)[y] for the
energy of an image together with a label and E(x) = -log sum_k exp f(x)[k] for that of the image
alone: low energy means "the model finds this likely". The loss everybody trains with is a
difference of the two,

    cross-entropy(x, y) = E(x, y) - E(x),

so an attack that raises the loss must raise E(x, y), lower E(x), or both. Adversarial training
minimises the loss at x*, the worst point an attack finds within eps of x. FGSM finds it in ONE
gradient step (single-step, cheap), PGD in several (multi-step, stronger). How much the attack moves
the energies are the DELTA ENERGIES, dE(x) = E(x) - E(x*) and dE(x, y) = E(x, y) - E(x*, y), in nats
(natural-log units).

Two things go wrong. Single-step training collapses against PGD (catastrophic overfitting, CO): the
landscape bends between x and x*, so that more and more x* have a LOWER loss than x (abnormal
adversarial examples, AAEs). Multi-step training overfits slowly (robust overfitting, RO): its
robustness decays on new images while it rises on those of training. The Delta Energy Regularizer
(DER) adds beta * mean sqrt(dE(x)^2 + dE(x, y)^2) to the loss and keeps the landscape flat there.

Part one tells this in order: 1 energies, 2 attacks, 3 losses and DER, 4 overfitting, 5 the training
loop, 6 generation. Part two is there to look things up in: networks, rivals, data, judging.

Notation (N images, C channels, K classes)

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

Paper: "Understanding Adversarial Training with Energy-based Models", Mirza et al. 2025,
arXiv 2505.22486. Predecessor: "Shedding More Light on Robust Classifiers under the lens of
Energy-based Models", Mirza et al., ECCV 2024, arXiv 2407.06315.

What differs from the paper: DER is its equation (7) as a public reimplementation gives it. That
beta grows over training, its size, and the alarm's thresholds were measured here, on this
project's data; local PCA, energy guidance and the stop in section 6 are our reading.
"""

import contextlib
import copy
import dataclasses
import difflib
import math
import os
import stat
import time
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ##################################################################################################
# PART ONE: the story, in reading order.
# ##################################################################################################


# ==== 1. Energies =================================================================================


# Energies stand for densities: p(x, y) = exp(-E(x, y)) / Z and p(x) = exp(-E(x)) / Z, with one Z
# that makes them sum to 1. Nobody can compute Z, and nobody has to: it cancels in p(y|x) =
# p(x, y) / p(x), which is the softmax, and in every difference of energies. Energies are in nats:
# their logarithms are natural ones.


def energy_xy(logits, y):
    """(E1) Joint energy E(x, y) = -f(x)[y]. logits (N, K), y (N,) -> (N,). Lower: likelier."""
    return -logits.float().gather(1, y[:, None]).squeeze(1)


def energy_x(logits):
    """(E2) Marginal energy E(x) = -log sum_k exp f(x)[k]. logits (N, K) -> (N,). Lower is likelier.

    exp(-E(x)) is the sum of exp(-E(x, y)) over y: the label is summed out, as in any joint density.
    Source: Grathwohl et al. 2020 (the joint energy-based model, JEM), section 3.
    """
    return -logits.float().logsumexp(1)


# (E3)  cross-entropy = -log p(y|x) = -f(x)[y] + log sum_k exp f(x)[k] = E(x, y) - E(x), exactly.


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
    leads down has met a landscape bent within the ball, which is what catastrophic overfitting is.
    Source: Lin, Yu & Liu 2023 (AAER).
    """
    return delta_energy(logits, logits_adv, y) > delta_energy(logits, logits_adv)


# ==== 2. Attacks: pure functions of (model, x, y, eps) ============================================


def fgsm(model, x, y, eps, *, norm="linf", loss="ce", targeted=False, start=None, step=None,
         inside_ball=True, batchnorm="eval", validate=True):  # fmt: skip
    """(E7) Fast gradient sign method: x* = clip(x + eps * sign grad_x CE(x, y)); l_2: see ascend.

    Args:
        model: images in [0, 1] -> logits (N, K). Left exactly as it was.
        x, y: images float (N, C, H, W) in [0, 1]; labels int64 (N,).
        eps: radius of the ball, in pixel units; 0 returns x.
        norm, loss, targeted: "linf" or "l2"; one of ATTACK_LOSSES; y is the label to reach.
        start: where the gradient is taken, if not at x. The kl loss, 0 and flat at x, needs one.
        step: length of the step, default eps.
        inside_ball: False leaves x* outside the ball where start + step led there.
        batchnorm: "eval", or "train" for the batch's own statistics (see attack_mode).
        validate: False skips the range checks, which make a GPU wait for the host.
    Returns: x_adv, like x, detached.
    Raises: BadInput.
    Source: Goodfellow et al. 2015.
    """
    if validate:
        check_attack(x, y, eps, norm)
    start = x if start is None else start
    with attack_mode(model, batchnorm):
        reference = model(x).detach() if loss == "kl" else None
        gradient = input_gradient(model, start, y, loss, targeted, reference)
    x_adv = ascend(start, gradient, eps if step is None else step, norm)
    return (project(x_adv, x, eps, norm) if inside_ball else x_adv.clamp(0, 1)).detach()


def rs_fgsm(model, x, y, eps, *, norm="linf", generator=None, start=None, **options):
    """(E8) FGSM from x + U(-eps, eps), with one step of 1.25 eps, back into the ball.

    Arguments as for fgsm, but for `step`; `generator` draws the start. Source: Wong et al. 2020.
    """
    if start is None:
        start = (x + random_noise(x, eps, norm, generator)).clamp(0, 1)
    return fgsm(model, x, y, eps, norm=norm, start=start, step=1.25 * eps, **options)


def n_fgsm(model, x, y, eps, *, norm="linf", generator=None, start=None, **options):
    """(E9) Noisy FGSM: x0 = x + U(-2 eps, 2 eps), one step of eps, and NO clipping to the ball.

    So x* may lie up to 3 eps away from x, but always in [0, 1]: it is meant for training, not for
    judging. Arguments as for fgsm, but for `inside_ball`; `generator` draws the start.
    Source: de Jorge et al. 2022, algorithm 1.
    """
    if start is None:
        start = (x + random_noise(x, 2 * eps, norm, generator)).clamp(0, 1)
    return fgsm(model, x, y, eps, norm=norm, start=start, inside_ball=False, **options)


def pgd(model, x, y, eps, steps=10, step_size=None, *, norm="linf", loss="ce", targeted=False,
        random_start=True, start=None, batchnorm="eval", generator=None,
        validate=True):  # fmt: skip
    """(E10) Projected gradient descent: `steps` times x* <- project(x* + step_size * direction).

    Args:
        steps, step_size: how many, how long; default length eps / 4 (2/255 at 8/255, Rice et al.).
        random_start: begin at a uniform draw from the ball, by `generator`, instead of at x.
        start: begin exactly there; overrides random_start.
        The others as for fgsm.
    Returns: x_adv, like x, detached: the last iterate.
    Raises: BadInput.
    Source: Madry et al. 2018.
    """
    if validate:
        check_attack(x, y, eps, norm)
    step_size = eps / 4 if step_size is None else step_size
    x_adv = x if start is None else start
    if start is None and random_start:
        x_adv = (x + random_noise(x, eps, norm, generator)).clamp(0, 1)
    with attack_mode(model, batchnorm):
        reference = model(x).detach() if loss == "kl" else None
        for _ in range(steps):
            gradient = input_gradient(model, x_adv, y, loss, targeted, reference)
            x_adv = project(ascend(x_adv, gradient, step_size, norm), x, eps, norm)
    return x_adv.detach()


@contextlib.contextmanager
def true_fp32():
    """Switches off what rounds fp32 products to 10 bits or fewer (TF32), and back on at the end."""
    of = torch.backends  # the older allow_tf32 raises once a caller has used these switches
    kinds = of.cudnn.conv, of.cuda.matmul, of.mkldnn.conv, of.mkldnn.matmul
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before):
            kind.fp32_precision = precision


def ascend(x_adv, gradient, step, norm="linf"):
    """The steepest step of length `step`: along the sign for l_inf, along the gradient for l_2."""
    direction = gradient.sign() if norm == "linf" else gradient / per_image_norm(gradient)
    return direction.nan_to_num_(0).mul_(step).add_(x_adv)  # in place: cheaper; at NaN: no step


def project(x_adv, x, eps, norm="linf"):
    """The nearest point to x_adv within eps of x, then within [0, 1]."""
    delta = x_adv - x
    if norm == "linf":
        delta.clamp_(-eps, eps)
    else:
        delta.mul_((eps / per_image_norm(delta)).clamp(max=1))
    return delta.add_(x).clamp_(0, 1)


def random_noise(x, eps, norm="linf", generator=None):
    """A uniform draw from the eps-ball around 0, one per image, shaped like x."""
    draw = dict(generator=generator, device=x.device)
    if norm == "linf":
        return ((torch.rand(x.shape, **draw) * 2 - 1) * eps).to(x.dtype)
    direction, radius = torch.randn(x.shape, **draw), torch.rand(len(x), 1, 1, 1, **draw)
    radius = eps * radius ** (1 / x.shape[1:].numel())  # uniform in volume, not in radius
    return (radius * direction / per_image_norm(direction)).to(x.dtype)


def per_image_norm(d):
    """l_2 norm of each image, never quite 0: (N, C, H, W) -> (N, 1, 1, 1)."""
    least = max(1e-12, torch.finfo(d.dtype).tiny)
    return d.flatten(1).norm(dim=1).clamp_min(least).view(-1, 1, 1, 1)


def value_and_gradient(model, x, y, loss="ce", reference=None, target=None):
    """Attack loss (N,), its gradient with respect to the images (N, C, H, W), and logits (N, K).

    torch.autograd.grad(value, x) computes nothing for the weights: cheaper than backward(), and no
    `.grad` is touched. (With torch.compile only since attack_mode freezes the weights.)
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        value = attack_loss(logits, y, loss, reference, target)
        if value.requires_grad:  # perhaps through the weights alone
            (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        if not value.requires_grad or gradient is None:
            raise BadInput("no gradient reaches the images (no_grad, .data or integers inside?)")
    return value.detach(), gradient, logits.detach()


def input_gradient(model, x, y, loss="ce", targeted=False, reference=None):
    """Gradient of the attack loss with respect to the images alone: (N, C, H, W).

    `targeted`: y is the label to reach, so the loss is to go down.
    """
    gradient = value_and_gradient(model, x, y, loss, reference)[1]
    return -gradient if targeted else gradient


# ==== 3. What training minimises: the losses and DER ==============================================


def adversarial_loss(logits, logits_adv, y, beta):
    """(E11) Cross-entropy of the adversarial twins: what FGSM's kinds and PGD minimise. A scalar.

    `logits` and `beta` are not used; they are here so that all losses are called alike.
    Source: Madry et al. 2018.
    """
    return F.cross_entropy(logits_adv.float(), y)


def der(logits, logits_adv, y, gamma=0.0, abnormal_only=False):
    """(E12) Delta Energy Regularizer: mean of max(0, dE(x, x*, y) - gamma). A scalar.

    Added to the loss of any method as beta * der. Gradients flow through all FOUR energies: the
    landscape is flattened between x and x*, it is not only x* that is pulled towards x.

    Why it helps. Under catastrophic overfitting the loss is bent between x and the one point where
    single-step training looks: that one point is made safe, and points that a few PGD steps
    reach are not. A landscape that is flat from x to x* leaves no room for such a bend.

    Args:
        logits, logits_adv (N, K), of the images and of their adversarial twins; y int64 (N,).
        gamma: change that is left alone, in nats.
        abnormal_only: mean over the abnormal examples only (see abnormal), 0 where there are none.
    Source: equation (7) of Mirza et al. 2025, as a public reimplementation gives it.
    """
    excess = F.relu(delta_energy_norm(logits, logits_adv, y) - gamma)
    if not abnormal_only:
        return excess.mean()
    chosen = abnormal(logits, logits_adv, y)
    return (excess * chosen).sum() / chosen.sum().clamp_min(1)


def beta_at(config, progress):
    """Weight of DER at `progress` in [0, 1) of the run: from der_from on, grown over der_ramp.

    Why it grows: early on the network has to learn before there is anything to flatten (beta 2 from
    the start learns nothing on shapes), and collapse threatens late.
    """
    if not config.der or progress < config.der_from:
        return 0.0
    since = progress - config.der_from
    return config.beta * (min(1.0, since / config.der_ramp) if config.der_ramp else 1.0)


def trades_loss(logits, logits_adv, y, beta=6.0):
    """(E13) TRADES: CE(f(x), y) + beta * KL(p(.|x) || p(.|x*)). A scalar.

    In energies KL = sum_k p(k|x) (E(x*, k) - E(x, k)) + dE(x): part of what TRADES presses down IS
    the delta energy. Its authors pass x through the network twice in train mode, which moves
    BatchNorm's statistics further; here once.
    Source: Zhang et al. 2019; the identity: Mirza et al. 2024, proposition 1.
    """
    return F.cross_entropy(logits.float(), y) + beta * kl_per_image(logits, logits_adv).mean()


def training_loss(model, x, y, x_adv, noise, beta, config):
    """Everything that is minimised: the method's loss plus the regularizers that are switched on.

    Args: beta, the weight of DER at this step, 0 where it is off.
    Returns: the loss (scalar) and the logits of x_adv (N, K).
    """
    method = METHODS[config.method]
    logits = model(x) if method.needs_clean or beta else None
    logits_adv = model(x_adv)
    loss = method.loss(logits, logits_adv, y, config.method_beta)
    if beta:
        penalty = der(logits, logits_adv, y, config.gamma, config.der_on == "abnormal")
        if config.der_on == "abnormal" and dist.is_initialized():
            # Each process has met other AAEs: its mean counts by its share of all of them.
            own = abnormal(logits, logits_adv, y).sum().float()
            total = own.clone()
            sum_over_processes([total])
            penalty = penalty * own * world()[1] / total.clamp_min(1)
        loss = loss + beta * penalty
    if config.grad_align:
        with attack_mode(model, "train", freeze=False):
            loss = loss + config.grad_align * grad_align(model, x, y, noise)
    return loss, logits_adv


# ==== 4. Overfitting: what is measured, and when the alarm rings ==================================


@torch.no_grad()
def evaluate(model, x, y, eps, steps=10, norm="linf", dtype=torch.float32, batch_size=500):
    """Accuracies and energies of a model on images, clean and under FGSM and PGD.

    Args: x (N, C, H, W), uint8 or float in [0, 1], and y int64 (N,), on the model's device; eps,
        steps and norm of the attacks (PGD: one random start, step eps / 4, the same noise at every
        call).
    Returns: dict of floats, means over the images: clean_acc, fgsm_acc, pgd_acc and fgsm_aae (the
        share of AAEs under FGSM), all in [0, 1]; energy, E(x); delta_energy_fgsm and
        delta_energy_pgd, dE(x); abs_delta_energy_pgd, |dE(x)|; delta_energy_xy_pgd, dE(x, y); and
        n, how many images. Energies are in nats.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    logits = {"clean": [], "fgsm": [], "pgd": []}
    with attack_mode(model), autocast(x.device, dtype), true_fp32():
        for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
            xb = as_pixels(xb)
            logits["clean"].append(model(xb))
            options = dict(norm=norm, validate=False)
            logits["fgsm"].append(model(fgsm(model, xb, yb, eps, **options)))
            x_adv = pgd(model, xb, yb, eps, steps, generator=generator, **options)
            logits["pgd"].append(model(x_adv))
    clean, single, multi = (torch.cat(logits[k]).float() for k in ("clean", "fgsm", "pgd"))
    found = {f"{k}_acc": (torch.cat(v).argmax(1) == y).float().mean() for k, v in logits.items()}
    found["fgsm_aae"] = abnormal(clean, single, y).float().mean()
    found["energy"] = energy_x(clean).mean()
    found["delta_energy_fgsm"] = delta_energy(clean, single).mean()
    found["delta_energy_pgd"] = delta_energy(clean, multi).mean()
    found["abs_delta_energy_pgd"] = delta_energy(clean, multi).abs().mean()
    found["delta_energy_xy_pgd"] = delta_energy(clean, multi, y).mean()
    return {"n": len(x)} | {k: v.item() for k, v in found.items()}


@dataclass
class OverfittingMonitor:
    """Says in words whether training is healthy, from measurements on the VALIDATION split.

    Catastrophic overfitting (CO): PGD accuracy collapses while single-step accuracy holds. Neither
    the share of AAEs nor dE is asked: on the stored runs the accuracies missed least and rang
    falsely never (tutorials/alarms.py). Robust overfitting (RO): PGD accuracy decays from its best
    while accuracy on the attacked training images keeps rising.
    """

    co_gap: float = 0.12  # CO: single-step accuracy exceeds PGD accuracy by that much ...
    co_ratio: float = 0.35  # ... PGD keeps less than that share of it (healthy: .5 and more) ...
    co_fall: float = 0.60  # ... and has fallen below this share of its own best,
    co_never: tuple = (0.5, 0.1)  # or never rose: single-step above .5, PGD below a tenth of that
    ro_drop: float = 0.04  # RO: PGD accuracy lies that far below its best, and 1.5 standard errors
    ro_rise: float = 0.05  # ... while training accuracy has risen by that much since
    ro_window: int = 3  # both as means over that many epochs: one epoch is too noisy to judge by
    best: float = 0.0  # best PGD accuracy so far, of one measurement
    recent: list = field(default_factory=list)  # (PGD, training accuracy) of the last epochs
    peak: list = field(default_factory=list)  # best mean PGD accuracy, training accuracy, epoch

    def catastrophic(self, found, when, train_adv_acc=0.0):
        """A sentence why `found` (see evaluate) shows CO, or "". when: such as "epoch 5".

        train_adv_acc: accuracy on the training attack's images, where that is single-step at full
        eps. A model attacked in BatchNorm's train mode learns to fool that very attack, and FGSM in
        eval mode need not show it.
        """
        pgd_acc, single = found["pgd_acc"], max(found["fgsm_acc"], train_adv_acc)
        self.best = max(self.best, pgd_acc)
        apart = single - pgd_acc >= self.co_gap and pgd_acc <= self.co_ratio * single
        fallen = pgd_acc < self.co_fall * self.best
        never = single >= self.co_never[0] and pgd_acc <= self.co_never[1] * single
        if not (apart and (fallen or never)):
            return ""
        return (
            f"Catastrophic overfitting struck at {when}: PGD accuracy fell to {pgd_acc:.1%}"
            f" (best {self.best:.1%}) while single-step accuracy is"
            f" {single:.1%} (alarm when PGD keeps less than {self.co_ratio:.0%} of it);"
            f" delta energy under PGD {found['delta_energy_pgd']:+.2f}"
        )

    def robust(self, found, train_adv_acc, epoch):
        """A reason why the last epochs show RO, or ""."""
        self.recent = (self.recent + [(found["pgd_acc"], train_adv_acc)])[-self.ro_window :]
        if len(self.recent) < self.ro_window:
            return ""
        pgd_acc, train_acc = (sum(v) / self.ro_window for v in zip(*self.recent))
        if not self.peak or pgd_acc > self.peak[0]:
            self.peak = [pgd_acc, train_acc, epoch]
        best, train_then, when = self.peak
        limit = max(self.ro_drop, 1.5 * math.sqrt(best * (1 - best) / found["n"]))
        struck = best - pgd_acc >= limit and train_acc - train_then >= self.ro_rise
        if not struck:
            return ""
        return (
            f"Robust overfitting by epoch {epoch}: PGD accuracy on held-out images fell from"
            f" {best:.1%} (around epoch {when}) to {pgd_acc:.1%} (alarm at"
            f" {100 * limit:.1f} points less) while on attacked training images it rose from"
            f" {train_then:.1%} to {train_acc:.1%};"
            f" delta energy under PGD is {found['delta_energy_pgd']:+.2f}"
        )


# ==== 5. The training loop: one for every method ==================================================

SCHEDULES = ["triangular", "piecewise", "cosine", "constant"]


def lr_at(config, progress):
    """Learning rate at `progress` in [0, 1) of the whole run."""
    if config.schedule == "triangular":  # 0 -> lr -> 0
        return config.lr * min(progress / config.lr_peak, (1 - progress) / (1 - config.lr_peak))
    if config.schedule == "piecewise":
        return config.lr * 0.1 ** sum(progress >= float(at) for at in config.lr_drops.split(","))
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


def eps_at(config, epochs_done):
    """Radius of the training attack after a (fractional) number of epochs: the linear warm-up.

    Why: in the first steps the landscape is rough and the full eps carries single-step training
    straight into collapse, with DER too; grown into, it usually does not.
    """
    warmth = min(1.0, epochs_done / config.eps_warmup) if config.eps_warmup else 1.0
    return config.eps * warmth


def attack_start(x, method, eps, norm, generator=None):
    """Where the training attack starts from: images like x.

    The Gaussian start of TRADES, x + .001 N(0, 1), is as good as none for cross-entropy, but KL has
    zero gradient at x itself and needs to be nudged off it.
    """
    start = METHODS[method].start
    if start in ("none", "zero"):
        return x
    if start == "gauss":
        return x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device)
    noise = random_noise(x, 2 * eps if start == "wide" else eps, norm, generator)
    return (x + noise).clamp(0, 1)


def training_attack(model, x, y, start, eps, config):
    """x* as config.method makes it, from `start` (see attack_start)."""
    # BatchNorm in train mode, as published training code runs it: on shapes FGSM then reaches 20
    # to 22% under PGD in each of five seeds before it collapses, in eval mode 3 to 20%.
    options = dict(norm=config.norm, start=start, batchnorm=config.attack_bn, validate=False)
    method = METHODS[config.method]
    if method.start == "none":
        return x
    if method.multi_step:
        step = config.attack_step or None
        return pgd(model, x, y, eps, config.attack_steps, step, loss=method.climbs, **options)
    single_step = {"zero": fgsm, "ball": rs_fgsm, "wide": n_fgsm}[method.start]
    return single_step(model, x, y, eps, **options)


# What every step gives away for nothing (see Trainer.step), as means over an epoch.
TRACKED = ["train_adv_acc", "train_adv_aae", "train_adv_delta_energy", "train_adv_delta_energy_xy"]


HISTORY = [  # of history.csv; on test images, but for train_... and val_...; energies in nats
    "epoch", "lr", "train_loss", "clean_acc", "fgsm_acc", "pgd_acc", "val_pgd_acc",
    "energy", "delta_energy_fgsm", "delta_energy_pgd", "abs_delta_energy_pgd",
    "train_delta_energy_pgd", "verdict", "seconds", "val_fgsm_acc", "val_delta_energy_pgd",
    "probe_seconds", "fgsm_aae", "val_fgsm_aae", *TRACKED,
]  # fmt: skip

REACTIONS = ["continue", "stop", "rollback", "der"]


class Trainer:
    """The state of a run: model, optimiser, averaged weights, monitor, history, best so far."""

    RESUMED = ("best", "history", "alarms", "epoch", "finished", "reason", "schedule_start")

    def __init__(self, config, data, model, resume=None):
        check_config(config)
        self.config, self.model = dataclasses.replace(config), model
        self.device = pick_device(config.device)
        self.dtype = pick_precision(config.precision, self.device)
        self.data = data.to(self.device)
        model.to(self.device)
        self.net = torch.compile(model) if config.compile else model  # same weights, faster calls
        size, n = config.batch_size, len(data.x_train)
        self.steps = n // size  # per epoch; a last partial batch is left out
        if self.steps < 1:
            raise BadInput(f"batch_size {size} exceeds the {n} training images")
        if size % world()[1]:
            raise BadInput(f"batch_size {size} is not divisible by {world()[1]} processes")
        decay = config.weight_decay
        self.optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, 0, decay)
        self.ema = copy.deepcopy(model) if config.ema else None
        self.judged = self.ema or model  # what is measured and kept
        parts = {"model": model, "optimizer": self.optimizer, "ema": self.ema}
        self.parts = {k: part for k, part in parts.items() if part}
        self.monitor, self.epoch, self.finished = OverfittingMonitor(), 0, False
        self.schedule_start = 0  # the epoch from which the learning rate counts; a rescue moves it
        self.verdict_now, self.reason = "at chance", ""  # of the last measurement, the last alarm
        self.history, self.alarms, self.saved_epoch = [], [], 0
        self.best = {"accuracy": -1.0, "epoch": 0, **self.snapshot()}  # under PGD, on validation
        self.fingerprint = checksum(data)
        if resume:
            self.restore(resume["training"])

    def snapshot(self):
        """A copy of all tensors that training changes."""
        return copy.deepcopy({k: part.state_dict() for k, part in self.parts.items()})

    def load_snapshot(self, parts):
        """Puts the tensors of a snapshot back, copied, so that it stays what it was."""
        for k, part in self.parts.items():
            part.load_state_dict(copy.deepcopy(parts[k]))

    def restore(self, saved):
        """Takes up a run where its checkpoint left it. Raises: RunError, BadInput."""
        row = dict.fromkeys(HISTORY, 0.0) | {"epoch": 0, "verdict": ""}
        alarm = {"verdict": "", "reason": "", "action": "", "der": False}
        like = self.checkpoint()["training"] | {"history": [row], "alarms": [alarm]}
        try:
            epochs = [0, saved["schedule_start"], saved["epoch"], len(saved["history"])]
            fits = alike(saved, like) and epochs == sorted(epochs) and epochs[2] == epochs[3]
            for part in (saved["best"], saved["now"]):  # a rescue may ask for the best later on
                self.load_snapshot(part)
                [kept["momentum_buffer"].view_as(p) for p, kept in self.optimizer.state.items()]
            self.monitor = OverfittingMonitor(**saved["monitor"])
            [torch.tensor(value) for value in saved["monitor"].values()]  # numbers, lists of them
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            fits = False
        if not fits or saved["data"] != self.fingerprint:
            images = "" if not fits else ": the training images are not those it began with"
            raise RunError(f"the checkpoint does not fit this run{images}; not resumed")
        stopped = any(alarm["action"] in ("stop", "rollback") for alarm in saved["alarms"])
        if saved["finished"] and saved["epoch"] < self.config.epochs and not stopped:
            ended = f"that run ended at epoch {saved['epoch']}"
            raise BadInput(f"{ended}: start a new one to train longer")
        if saved["der"] and not self.config.der:  # a rescue has switched DER on, at once
            self.config.der, self.config.der_from = True, 0.0
        vars(self).update(copy.deepcopy({k: saved[k] for k in self.RESUMED}))
        self.finished = self.finished or self.epoch >= self.config.epochs
        self.saved_epoch = self.epoch

    def checkpoint(self):
        """What last.pt holds: enough to use the model, and enough to go on as if never stopped."""
        return {
            "format": "ebm-at 1", "spec": getattr(self.model, "spec", None),
            "classes": self.data.classes,
            "config": dataclasses.asdict(self.config), "epoch": self.epoch,
            "model": self.judged.state_dict(),
            "training": {
                "now": self.snapshot(), "monitor": dataclasses.asdict(self.monitor),
                "data": self.fingerprint, "der": self.config.der,
                **{k: getattr(self, k) for k in self.RESUMED},
            },
        }  # fmt: skip

    def save(self, folder):
        """Writes last.pt (model and everything resume needs) and best.pt (model only)."""
        if folder is None or world()[0] > 0:  # only one process writes
            return
        last = self.checkpoint()
        save_checkpoint(os.path.join(folder, "last.pt"), last)
        best = {k: v for k, v in last.items() if k != "training"}
        kept = self.best["ema" if self.ema else "model"]
        best |= {"epoch": self.best["epoch"], "model": kept}
        save_checkpoint(os.path.join(folder, "best.pt"), best)
        self.saved_epoch = self.epoch

    def probe(self, split, size):
        """Measures `size` images of a split, always the same ones, at the run's full eps."""
        began = time.perf_counter()
        x, y = getattr(self.data, f"x_{split}"), getattr(self.data, f"y_{split}")
        rows = evenly(size, len(y)).to(self.device)
        x, y = x[rows], y[rows]
        found = evaluate(self.judged, x, y, self.config.eps, 10, self.config.norm, self.dtype)
        if dist.is_initialized():  # all processes must decide alike: what rank 0 measured counts
            values = torch.tensor(list(found.values()), device=self.device)
            dist.broadcast(values, 0)
            found = dict(zip(found, values.tolist()))
        self.probing += time.perf_counter() - began
        return found

    def step(self, rows, generator, at):
        """One step of SGD on the images `rows` (of the global batch), `at` a fraction of the run.

        Returns: the loss and the means of TRACKED, a tensor: reading it would stall a GPU.
        """
        config, model = self.config, self.net
        epochs_done = at * config.epochs
        beta = beta_at(config, at)
        eps = eps_at(config, epochs_done)
        x = as_pixels(augment(self.data.x_train[rows], config.augment, generator))
        start = share(attack_start(x, config.method, eps, config.norm, generator))
        noise = share(random_noise(x, eps, config.norm, generator)) if config.grad_align else None
        x, y = share(x), share(self.data.y_train[rows])

        def objective():
            """The loss and the logits of x*, in an autocast context of its own: it remembers the
            weights it has cast until it is left, and AWP moves them between two calls."""
            with autocast(self.device, self.dtype):
                return training_loss(model, x, y, x_adv, noise, beta, config)

        # The attack's first look at the model is at its start (where KL is climbed, at x), the
        # loss's is at x*: what the attack does to the energies costs nothing to know.
        seen = []
        with model.register_forward_hook(lambda m, i, logits: seen.append(logits.detach())):
            with autocast(self.device, self.dtype):
                x_adv = training_attack(model, x, y, start, eps, config)
        if seen and config.attack_bn == "eval":  # the loss has batch statistics: look with those
            with torch.no_grad(), attack_mode(model, "train"), autocast(self.device, self.dtype):
                seen = [model(start)]
        self.optimizer.zero_grad()
        shift = adversarial_weights(model, lambda: objective()[0], config.awp)
        awp = config.awp and epochs_done >= config.awp_warmup
        with shift if awp else contextlib.nullcontext():
            loss, logits_adv = objective()
            loss.backward()
        gradients = [p.grad for p in model.parameters()]
        sum_over_processes(gradients)
        if world()[1] > 1:
            torch._foreach_div_(gradients, world()[1])
        progress = (epochs_done - self.schedule_start) / (config.epochs - self.schedule_start)
        self.optimizer.param_groups[0]["lr"] = lr_at(config, progress)
        self.optimizer.step()
        if self.ema:
            self.average_weights(round(epochs_done * self.steps) + 1)
        with torch.no_grad():
            pair = (seen[0] if seen else logits_adv), logits_adv
            tracked = [logits_adv.argmax(1) == y, abnormal(*pair, y), delta_energy(*pair),
                       delta_energy(*pair, y)]  # fmt: skip
            return torch.stack([loss.detach(), *(t.float().mean() for t in tracked)])

    @torch.no_grad()
    def average_weights(self, steps):
        """Exponential moving average of weights and BatchNorm statistics: e <- d e + (1 - d) w.

        It looks back over about 1 / (1 - d) steps. Early on d is lower, so that this is a third of
        the `steps` done: the untrained weights it began with are forgotten within an epoch or two.
        """
        decay = min(self.config.ema, steps / (steps + 3))
        for kept, now in zip(self.ema.state_dict().values(), self.model.state_dict().values()):
            floats = kept.is_floating_point()  # all but BatchNorm's count of batches
            kept.copy_(kept.lerp(now, 1 - decay) if floats else now)

    def run_epoch(self, on_progress=None):
        """Trains for one epoch and measures; yields a record per alarm and then the epoch's row.

        All randomness of an epoch comes from a generator seeded by (seed, epoch): that is why a
        resumed run needs no random state to repeat an uninterrupted one bit for bit.
        """
        config, began, self.probing = self.config, time.perf_counter(), 0.0
        seed = config.seed * 100_003 + self.epoch
        on_cpu = torch.Generator().manual_seed(seed)  # one order of the images on every device
        order = torch.randperm(len(self.data.x_train), generator=on_cpu).to(self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        steps = []  # loss and TRACKED of each: (1 + 4,)
        self.model.train()
        for i in range(self.steps):
            rows = order[i * config.batch_size : (i + 1) * config.batch_size]
            at = (self.epoch + i / self.steps) / config.epochs
            steps.append(self.step(rows, generator, at))
            if on_progress:
                on_progress(self.epoch, i + 1, self.steps)
            done = i + 1  # CO strikes within an epoch
            if done % config.probe_every == 0 and done < self.steps:
                self.mean_step(steps)
                found = self.probe("val", min(200, config.probe_size))  # few: it must stay cheap
                yield from self.react(found, f"epoch {self.epoch + 1}, step {i + 1}")
                if self.finished:
                    return
        row = self.mean_step(steps)
        self.epoch += 1
        yield from self.measure(row, began)

    def mean_step(self, steps):
        """The epoch's means so far, as columns of HISTORY; refuses to go on once a loss is NaN."""
        totals = torch.stack(steps)
        sum_over_processes([totals])
        totals = (totals / world()[1]).cpu().double()
        for step in (~totals[:, 0].isfinite()).nonzero()[:1, 0].tolist():
            loss = totals[step, 0]
            self.diverged(f"the loss became {loss} at step {step + 1} of", self.epoch + 1)
        return dict(zip(["train_loss", *TRACKED], totals.mean(0).tolist()))

    def diverged(self, what, epoch):
        """Raises the RunError of a run that cannot go on."""
        raise RunError(f"{what} epoch {epoch}; the last good checkpoint is kept; try a lower lr or"
                       " beta, or precision fp32")  # fmt: skip

    def measure(self, means, began):
        """Measures all splits, asks the monitor, keeps the best; yields alarms and the row.

        means: the epoch's train_loss and TRACKED.
        """
        config = self.config
        lr = self.optimizer.param_groups[0]["lr"]  # before a rescue puts an older optimiser back
        val = self.probe("val", config.probe_size)  # the verdict rests on it: the largest
        test = self.probe("test", math.ceil(config.probe_size / 2))
        train = self.probe("train", math.ceil(config.probe_size / 4))
        if not math.isfinite(val["energy"]):
            self.diverged("the weights became non-finite in", self.epoch)
        alarms = list(self.react(val, f"epoch {self.epoch}", means["train_adv_acc"]))
        accuracy = val["clean_acc" if config.method == "none" else "pgd_acc"]
        if not alarms and accuracy > self.best["accuracy"]:
            self.best = {"accuracy": accuracy, "epoch": self.epoch, **self.snapshot()}
        row = test | means | {
            "epoch": self.epoch, "lr": lr,
            "val_pgd_acc": val["pgd_acc"], "val_fgsm_acc": val["fgsm_acc"],
            "val_fgsm_aae": val["fgsm_aae"],
            "val_delta_energy_pgd": val["delta_energy_pgd"], "verdict": self.verdict_now,
            "train_delta_energy_pgd": train["delta_energy_pgd"], "probe_seconds": self.probing,
            "seconds": time.perf_counter() - began - self.probing,
        }  # fmt: skip
        self.history.append({k: row[k] for k in HISTORY})
        self.finished = self.finished or self.epoch >= config.epochs
        yield from alarms
        yield {"kind": "epoch", **self.history[-1]}

    def react(self, found, when, train_adv_acc=None):
        """Asks the monitor; on the first alarm of a kind does what on_overfit says, and yields it.

        found: see evaluate; train_adv_acc: only at the end of an epoch (RO needs whole epochs).
        """
        if self.config.method == "none":  # no robustness to lose
            self.verdict_now = "not robust"
            return
        # A constant answer is right for one image in K, whatever an attack does: no merit.
        sound = "healthy" if found["pgd_acc"] > 1 / len(self.data.classes) else "at chance"
        self.verdict_now = sound
        if self.epoch < self.config.eps_warmup:  # measured at an eps that it has not met yet
            return
        single = 0.0 if METHODS[self.config.method].multi_step else train_adv_acc or 0.0
        if self.epoch < self.config.eps_warmup + 1:  # that accuracy was measured at a smaller eps
            single = 0.0
        reason, verdict = self.monitor.catastrophic(found, when, single), "CO"
        if not reason and train_adv_acc is not None:
            reason, verdict = self.monitor.robust(found, train_adv_acc, self.epoch), "RO"
        if not reason:
            return
        self.verdict_now = verdict
        self.reason = reason
        action, had_der = self.config.on_overfit, self.config.der
        if (verdict, had_der) in [(alarm["verdict"], alarm["der"]) for alarm in self.alarms]:
            return  # each kind of alarm rings once without DER, once with it
        if action == "der" and had_der:
            action = "rollback"  # DER is on already and did not hold: keep the best there was
        if action in ("rollback", "der"):
            self.load_snapshot(self.best)
        if action == "der":
            # The schedule starts anew over the epochs that are left: a triangular one from 0, so
            # that DER meets a low rate first. At a high one it would undo what was learnt.
            self.config.der, self.schedule_start = True, self.epoch
            self.config.der_from = 0.0  # now, not late
            self.monitor = OverfittingMonitor()
        self.finished = action in ("stop", "rollback")
        self.alarms.append({"kind": "alarm", "verdict": verdict, "epoch": self.epoch, "when": when,
                            "reason": reason, "action": action, "der": had_der,
                            "back_to_epoch": self.best["epoch"]})  # fmt: skip
        yield self.alarms[-1]

    def run(self, folder=None, on_progress=None):
        """Trains to the end; see `train` for what it yields."""
        if self.epoch == 0:
            self.save(folder)
        while not self.finished:
            for record in self.run_epoch(on_progress):
                if record["kind"] == "epoch":
                    self.save(folder)
                yield record
        self.save(folder)  # a stop within an epoch ends without an epoch's record
        self.model.load_state_dict(self.judged.state_dict())
        self.model.eval()  # so that whoever uses it next neither sees nor moves batch statistics

    def verdict(self):
        """What to say of the whole run: "healthy", "CO", "RO", "at chance" or "not robust"; why."""
        for alarm in self.alarms:  # CO stays the verdict even where accuracy recovers; RO may pass
            ended = alarm["action"] in ("stop", "rollback")
            if ended or (alarm["verdict"] == "CO" and alarm["action"] == "continue"):
                return alarm["verdict"], alarm["reason"]
        last = self.history[-1]
        if last["verdict"] in ("CO", "RO"):
            return last["verdict"], self.reason
        if last["verdict"] != "healthy":
            untrained = self.config.method == "none"
            why = "Not trained for robustness" if untrained else "No better than one answer for all"
            return last["verdict"], f"{why}: PGD accuracy is {last['val_pgd_acc']:.1%}"
        rescues = [f"{a['reason']}. DER was switched on. " for a in self.alarms if not a["der"]]
        rescue = rescues[0] if self.config.der and rescues else ""
        return "healthy", (
            f"{rescue}Healthy: on held-out images PGD accuracy is {last['val_pgd_acc']:.1%}"
            f" (best {self.best['accuracy']:.1%}), FGSM accuracy {last['val_fgsm_acc']:.1%},"
            f" delta energy under PGD {last['val_delta_energy_pgd']:+.2f}"
        )


def train(config, data, model=None, *, folder=None, resume=None, on_progress=None):
    """Trains a model by config.method; a generator that yields plain records as it goes.

    Args:
        config: Config, best made by `recipe`.
        data: Data (see load_data, which is where dataset, data_dir, limit and val_fraction of a
            Config go: here they are only recorded).
        model: trained in place; default build_model(config, data). It ends in eval mode with the
            last weights (with config.ema, the averaged ones).
        folder: an existing one for last.pt and best.pt, written after every epoch; None: no file.
        resume: what load_checkpoint read from a last.pt; goes on where that run stopped.
        on_progress: called as (epoch, step, steps per epoch) after every step.
    Yields: {"kind": "alarm", verdict, epoch, when, reason, action, back_to_epoch, der} when
        overfitting strikes, and {"kind": "epoch", ...}, the columns of HISTORY, after every epoch.
    Raises: BadInput for settings that do not fit the data; RunError when the loss diverges or a
        checkpoint cannot be written. The last good checkpoint stays.
    """
    model = build_model(config, data) if model is None else model
    yield from Trainer(config, data, model, resume).run(folder, on_progress)


# ==== 6. Generation: class-wise local PCA, energy guidance, adaptive stopping =====================


# The gradients of a robust classifier look like the class: walking down E(x, y) paints class y into
# an image. Where the walk STARTS decides how varied the pictures are, where it STOPS how good: real
# images are not the points of lowest energy, they lie where E(x, y) has a certain value, and a walk
# that goes on beyond it ends in saturated caricatures. So: start near the data, in a model of each
# class with few dimensions, and stop as soon as the energy is that of real images.


def principal_components(flat, components):
    """The leading principal directions of centred rows.

    They are eigenvectors of the covariance (D, D), but with n < D rows those u of the Gram matrix
    (n, n) are cheaper: the same eigenvalues s^2, and v = flat^T u / s. Where both are large and few
    directions wanted, neither is formed: a random subspace, multiplied by the covariance again and
    again (orthogonal iteration), turns towards the leading directions.

    Args: flat (n, D); components, how many (int), or the share of variance to retain (0 < v < 1).
    Returns: directions (P, D) with orthonormal rows, standard deviation along each (P,). Source:
    Halko, Martinsson & Tropp 2011, algorithm 4.4.
    """
    n, d = flat.shape
    # 10 more directions than wanted, and 6 rounds, make the leading ones as good as exact
    if components >= 1 and 20 * components < min(n, d):
        q = torch.randn(d, components + 10, generator=torch.Generator().manual_seed(0))
        q = q.to(flat)
        for _ in range(6):
            q = torch.linalg.qr(flat.T @ (flat @ q))[0]  # (D, P + 10)
        _, s, v = torch.linalg.svd(flat @ q, full_matrices=False)
        v = v @ q.T
    else:
        values, u = torch.linalg.eigh(flat @ flat.T if n <= d else flat.T @ flat)  # ascending
        s, v = values.flip(0).clamp_min(0).sqrt(), u.flip(1).T  # of covariance: rows of v (D, D)
        if n <= d:  # of the Gram matrix: those rows are u^T (n, n)
            v = (v @ flat) / s.clamp_min(1e-12)[:, None]
    if components < 1:
        retained = (s**2).cumsum(0) / (s**2).sum().clamp_min(1e-12)
        components = int((retained < components).sum()) + 1
    keep = min(components, int((s > 1e-3 * s[0]).sum()))  # below, a float32 Gram matrix is noise
    return v[:keep], s[:keep] / math.sqrt(max(n - 1, 1))


@dataclass
class ClassPCA:
    """(E14) One PCA per class: codes z = V_y (x - mu_y) of an image, and back, x = mu_y + V_y^T z.

    mean (K, D); components V (K, P, D), orthonormal rows, zeros where a class has fewer than P; std
    (K, P), of real codes; codes (n, P) and labels (n,) of all real images; shape of an image,
    [C, H, W] with D = C H W.
    """

    mean: torch.Tensor
    components: torch.Tensor
    std: torch.Tensor
    codes: torch.Tensor
    labels: torch.Tensor
    shape: list
    AT_ONCE = 2**26  # floats of images in memory at a time, 256 MB: 21,845 images of 3x32x32

    @classmethod
    def fit(cls, x, y, num_classes, components=50):
        """Fits one PCA to the images of each class, on the device they lie on.

        At most AT_ONCE / D of them, taken evenly, so that memory beyond x and the result stays near
        1 GB. Args: x, uint8, or float in [0, 1], (n, C, H, W); y int64 (n,); components, their
        number, or the share of variance they retain. Raises: BadInput.
        """
        if len(y) and (y.min() < 0 or y.max() >= num_classes):
            raise BadInput(f"labels from {y.min()} to {y.max()}, but {num_classes} classes to fit")
        whole = 1 <= components < math.inf and components == int(components)
        if not whole and not 0 < components < 1:
            raise BadInput(f"components must be a whole number or a share below 1: {components}")
        fitted = []
        for k in range(num_classes):
            rows = (y == k).nonzero().squeeze(1)
            if len(rows) == 0:
                raise BadInput(f"class {k} has no images; the PCA needs some of every class")
            rows = rows[evenly(max(2, cls.AT_ONCE // x[0].numel()), len(rows)).to(rows.device)]
            of_class = as_pixels(x[rows]).flatten(1)
            mean = of_class.mean(0)
            v, std = principal_components(of_class - mean, int(components) if whole else components)
            fitted.append((mean, v.clone(), std))  # v is part of a matrix as large as of_class
        most = max(1, max(len(s) for _, _, s in fitted))
        v = torch.stack([F.pad(v, (0, 0, 0, most - len(v))) for _, v, _ in fitted])
        std = torch.stack([F.pad(s, (0, most - len(s))) for _, _, s in fitted])
        mean = torch.stack([mean for mean, _, _ in fitted])
        pca = cls(mean, v, std, torch.empty(0), y, list(x.shape[1:]))
        pca.codes = pca.encode(x, y)
        return pca

    def encode(self, x, y):
        """Codes of images under their class's PCA: (N, C, H, W), (N,) -> (N, P)."""
        z = torch.empty(len(x), self.std.shape[1], device=self.mean.device)
        for k in y.unique().tolist():
            for rows in (y == k).nonzero()[:, 0].split(1 + self.AT_ONCE // self.mean.shape[1]):
                z[rows] = (as_pixels(x[rows]).flatten(1) - self.mean[k]) @ self.components[k].T
        return z

    def decode(self, z, y):
        """Images of codes, not clipped to [0, 1]: (N, P), (N,) -> (N, C, H, W)."""
        x = torch.empty(len(z), self.mean.shape[1], device=self.mean.device)
        for k in y.unique().tolist():  # class by class: a gather of V_y would take 600 kB an image
            rows = y == k
            x[rows] = self.mean[k] + z[rows] @ self.components[k]
        return x.view(len(z), *self.shape)


STARTS = {
    "local-pca": "a Gaussian on the neighbourhood of a real image, in PCA space",
    "gaussian": "one Gaussian per class, fitted in PCA space",
    "pca": "class mean + .35 g std along each component (predecessor: .005 sqrt(n - 1); n 5,000)",
    "mean": "the mean image of the class",
    "noise": "uniform noise, the same for all classes",
}


def local_codes(pca, y, neighbours=10, temperature=1.5, generator=None):
    """(E15) z = m + sqrt(T / (k - 1)) sum_j g_j (z_j - m),  g_j ~ N(0, 1),  m = mean_j z_j.

    The z_j are the k codes nearest to that of an anchor, an image of the class drawn at random, so
    z is a draw from the Gaussian fitted to them: its covariance is T times theirs, without forming
    a matrix. A class is not one Gaussian cloud but a curved sheet; small patches of it are flat.
    The m lie closer together than the images do; T = 1.5 makes up for it (total variance of the
    codes over that of real ones: 1.06 on shapes, .91 on CIFAR-10; with T = 1 .85 and .78).

    Args: y int64 (N,), classes; neighbours k, at least 2; temperature T, 0 gives the mean of each
        neighbourhood.
    Returns: codes (N, P). Raises: BadInput when a class has fewer than k images.
    """
    if neighbours < 2 or temperature < 0:
        raise BadInput("neighbours must be at least 2 and temperature not negative")
    z = torch.empty(len(y), pca.std.shape[1], device=pca.mean.device)
    for k in y.unique().tolist():
        rows, own = (y == k).nonzero().squeeze(1), pca.codes[pca.labels == k]
        if neighbours > len(own):
            raise BadInput(f"{neighbours} neighbours, but class {k} has only {len(own)} images")
        draw = dict(generator=generator, device=own.device)
        anchors = own[torch.randint(len(own), rows.shape, **draw)]
        nearest = torch.cdist(anchors, own).topk(neighbours, largest=False).indices
        around = own[nearest]  # (n, k, P)
        centre = around.mean(1, keepdim=True)
        g = torch.randn(len(rows), 1, neighbours, **draw)
        g *= math.sqrt(temperature / (neighbours - 1))
        z[rows] = (centre + g @ (around - centre)).squeeze(1)
    return z


def draw_starts(pca, y, init="local-pca", neighbours=10, temperature=1.5, generator=None):
    """(E16) Where the walks begin: x0 = clip(mu_y + V_y^T z), z by `init`, one of STARTS.

    z = 0 for mean, s .35 g for pca, s g for gaussian (s: std of real codes, g ~ N(0, 1)).
    Args: y int64 (N,); neighbours and temperature for local-pca (see local_codes).
    Returns: images (N, C, H, W) in [0, 1]. Raises: BadInput.
    """
    check_choice("init", init, STARTS)
    draw = dict(generator=generator, device=pca.mean.device)
    if init == "noise":
        return torch.rand(len(y), *pca.shape, **draw)
    if init == "local-pca":
        z = local_codes(pca, y, neighbours, temperature, generator)
    else:
        scale = {"mean": 0.0, "pca": 0.35, "gaussian": 1.0}[init]
        z = scale * pca.std[y] * torch.randn(len(y), pca.std.shape[1], **draw)
    return pca.decode(z, y).clamp(0, 1)


def class_energies(model, x, y, num_classes, most=500, dtype=torch.float32, batch_size=500):
    """E(x, y) of real images, class by class: a list of K tensors, each (at most `most`,)."""
    rows = [(y == k).nonzero().squeeze(1)[:most] for k in range(num_classes)]
    for k, found in enumerate(rows):
        if len(found) == 0:
            raise BadInput(f"class {k} has no images; its energies are needed to know when to stop")
    logits = exact_logits(model, x[torch.cat(rows)], batch_size, dtype)
    return list(energy_xy(logits, y[torch.cat(rows)]).split([len(found) for found in rows]))


STOPS = ["mean", "quantile", "sampled", "fixed"]


def stop_targets(energies, y, stop="sampled", quantile=0.5, drawn=None):
    """(E17) The energy at which each walk ends: (N,), from the real energies of its class.

    mean: their mean. quantile: the value below which that share of them lies (small: likelier
    pictures, more steps). sampled: `drawn` (N,), one real energy per image, so that the pictures'
    energies are spread as real ones are; with a mean for a target the upper half of them is cut
    off, and to a robust judge so is half of the variety. fixed: -inf, never; all steps are taken.
    """
    check_choice("stop", stop, STOPS)
    if not 0 <= quantile <= 1:
        raise BadInput(f"quantile must lie in [0, 1], not {quantile}")
    if stop == "fixed":
        return torch.full((len(y),), -math.inf, device=y.device)
    if stop == "sampled":
        if drawn is None:
            raise BadInput("stop 'sampled' needs `drawn`, a real energy per image")
        return drawn
    of_class = [e.mean() if stop == "mean" else e.quantile(quantile) for e in energies]
    return torch.stack(of_class)[y]


def energy_gradient(model, x, y, mix=0.0):
    """E(x, y) (N,) and the gradient (N, C, H, W) of (E18) (1 - mix) E(x, y) + mix E(x)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        energy = energy_xy(logits, y)
        guide = energy if mix == 0 else (1 - mix) * energy + mix * energy_x(logits)
        (gradient,) = torch.autograd.grad(guide.sum(), x)
    return energy.detach(), gradient


@torch.no_grad()
def sgld(model, x, y, targets, *, steps=60, step_size=0.3, momentum=0.8, noise=0.001,
         normalize=True, mix=0.0, max_rise=100.0, dtype=torch.float32, batch_size=500,
         generator=None, on_progress=None):  # fmt: skip
    """(E19) Walks down the energy: nu <- zeta nu - eta g;  x <- clip(x + nu + noise N(0, 1)).

    The form is that of stochastic gradient Langevin dynamics, hence the name; but with momentum,
    unit-length gradients and a noise that does not follow the step it does NOT sample p(x, y): it
    descends, with a little noise, and the stop decides where it ends.

    Adaptive stopping: an image whose E(x, y) <= its target stops and leaves the batch. All images
    take step t before any takes step t + 1: the random numbers, and with them the pictures, do not
    depend on batch_size (beyond rounding).

    Args:
        x, y: starts, float (N, C, H, W) in [0, 1], which are not changed; labels int64 (N,).
        targets: (N,), energies to stop at (see stop_targets).
        steps: the most steps any image takes. step_size eta, momentum zeta, noise (a std): plain
            numbers in pixel units. mix: see energy_gradient. normalize: |g| = 1 per image (ours).
        max_rise: an image has diverged when E(x, y) exceeds its start by more nats than that.
        on_progress: called after every batch as (t + the share of step t done, x, rows that walk).
    Returns: images like x, and a record, a dict of (N,) tensors: steps taken, energy_start,
        energy_end, target, and stopped: 0 at the cap, 1 at its target, 2 diverged.
    Raises: BadInput. Source: Mirza et al. 2024, section 4 (walk); Mirza et al. 2025 (stopping).
    """
    check_attack(x, y, 0.0, "linf")
    if steps < 0 or not step_size > 0 or not 0 <= momentum < 1 or noise < 0 or batch_size < 1:
        raise BadInput("need steps >= 0, step_size > 0, 0 <= momentum < 1, noise >= 0, batch >= 1")
    if not 0 <= mix <= 1:
        raise BadInput(f"mix must lie in [0, 1], not {mix}")
    x, moving = x.clone(memory_format=torch.channels_last), torch.arange(len(x), device=x.device)
    nu = torch.zeros_like(x)
    taken, stopped = torch.zeros_like(y), torch.zeros_like(y)
    energy = torch.full(y.shape, math.nan, device=x.device)
    start = energy
    for step in range(steps + 1):
        gradient, batches = [], moving.split(batch_size)
        with attack_mode(model), autocast(x.device, dtype):
            for i, rows in enumerate(batches):
                energy[rows], g = energy_gradient(model, x[rows], y[rows], mix)
                gradient.append(g)
                if on_progress:
                    on_progress(step + i / len(batches), x, moving)
        start = energy.clone() if step == 0 else start
        gradient, now = torch.cat(gradient), energy[moving]
        lost = ~(now.isfinite() & gradient.flatten(1).isfinite().all(1))
        lost |= now > start[moving] + max_rise
        reached = ~lost & (now <= targets[moving])
        stopped[moving[reached]], stopped[moving[lost]] = 1, 2
        go = ~(reached | lost)
        if step == steps or not go.any():
            break
        moving, nu, gradient = moving[go], nu[go], gradient[go]
        if normalize:
            gradient = gradient / per_image_norm(gradient)
        nu = momentum * nu - step_size * gradient
        jitter = noise * torch.randn(nu.shape, generator=generator, device=x.device)
        x[moving] = (x[moving] + nu + jitter).clamp(0, 1)
        taken[moving] += 1
    record = {"steps": taken, "energy_start": start, "energy_end": energy, "target": targets}
    return x, record | {"stopped": stopped}


def generate(model, pca, y, energies, *, init="local-pca", neighbours=10, temperature=1.5,
             candidates=8, stop="sampled", quantile=0.5, seed=0, dtype=torch.float32,
             batch_size=500, on_progress=None, **walk):  # fmt: skip
    """Pictures of the classes y: starts by class-wise PCA, chosen and walked on by energy.

    Energy guidance of the start (E20): of `candidates` starts per image the one is kept whose
    E(x, y) is nearest to a draw from the real energies of its class. (The lowest would be the wrong
    rule: it prefers caricatures.) With stop="sampled" the walk ends at that same draw.

    Args:
        pca, energies: of real images, see ClassPCA.fit and class_energies. model: as for fgsm.
        y: int64 (N,), on the model's device: the class of each picture.
        init, neighbours, temperature: see draw_starts. stop, quantile: see stop_targets.
        seed: same seed, same pictures. The others, and `walk`: see sgld.
    Returns: images (N, C, H, W) in [0, 1] and the record of sgld.
    Raises: BadInput. Source: Mirza et al. 2025.
    """
    if candidates < 1:
        raise BadInput(f"candidates must be at least 1, not {candidates}")
    if len(y) and (y.min() < 0 or y.max() >= len(energies)):
        raise BadInput(f"classes {y.min()} to {y.max()} asked for, but there are {len(energies)}")
    generator = torch.Generator(y.device).manual_seed(seed)
    drawn = torch.empty(len(y), device=y.device)
    for k in y.unique().tolist():
        rows = y == k
        chosen = torch.randint(len(energies[k]), (int(rows.sum()),), generator=generator,
                               device=y.device)  # fmt: skip
        drawn[rows] = energies[k][chosen]
    targets = stop_targets(energies, y, stop, quantile, drawn)
    x, gap = draw_starts(pca, y, init, neighbours, temperature, generator), None
    if candidates > 1:
        gap = (energy_xy(exact_logits(model, x, batch_size, dtype), y) - drawn).abs()
    for _ in range(candidates - 1):  # one at a time: all candidates at once would fill the memory
        other = draw_starts(pca, y, init, neighbours, temperature, generator)
        other_gap = (energy_xy(exact_logits(model, other, batch_size, dtype), y) - drawn).abs()
        better = other_gap < gap
        x[better], gap[better] = other[better], other_gap[better]
    return sgld(model, x, y, targets, dtype=dtype, batch_size=batch_size, generator=generator,
                on_progress=on_progress, **walk)  # fmt: skip


# ##################################################################################################
# PART TWO: what the story stands on. Look things up in it; Python finds names when they are called.
# ##################################################################################################


# ==== 7. What attacks stand on: their losses, and a model left as it was ==========================

ATTACK_LOSSES = ["ce", "kl", "margin", "dlr", "energy", "energy-up"]


def attack_loss(logits, y, loss="ce", reference=None, target=None):
    """What an attack climbs, per image: logits (N, K), y (N,) -> (N,).

    ce:     -log p(y|x), the usual choice.
    kl:     KL(p(.|x) || p(.|x*)) against the `reference` logits of the clean images (TRADES).
    margin: max_{k != y} f(x)[k] - f(x)[y], positive exactly when x is misclassified (Carlini &
            Wagner 2017); unlike ce it does not flatten out where the model is confident.
    dlr:    (E21) margin / (f_(1) - f_(3)), where f_(i) is the i-th largest logit: the same whether
            logits are large or small. With a `target` t (N,) to reach instead of y, (E22)
            (f[t] - f[y]) / (f_(1) - (f_(3) + f_(4)) / 2). Croce & Hein 2020, equations 6 and 7.
            Fewer than 3 (4) classes have no such denominator: the numerator alone is climbed.
    energy: -E(x), so that climbing it makes the image likelier to the model, whatever its label.
    energy-up: (E23) margin until the image is misclassified, E(x) from there on: adversarial AND
            unlikely. A constant, 1000, ranks all fooling points above all others.
    """
    check_choice("attack loss", loss, ATTACK_LOSSES)
    logits = logits.float()
    if loss == "ce":
        return F.cross_entropy(logits, y, reduction="none")
    if loss == "kl":
        return kl_per_image(reference, logits)
    if loss == "energy":
        return -energy_x(logits)
    rival = logits.scatter(1, y[:, None], -math.inf).amax(1)
    margin = (rival if target is None else -energy_xy(logits, target)) + energy_xy(logits, y)
    if loss == "energy-up":
        return torch.where(margin > 0, 1000 + energy_x(logits), margin)
    if loss == "margin" or logits.shape[1] < (3 if target is None else 4):
        return margin
    top = logits.topk(3 if target is None else 4, dim=1).values
    return margin / (top[:, 0] - top[:, 2:].mean(1) + 1e-12)


def kl_per_image(logits, logits_adv):
    """KL(p(.|x) || p(.|x*)) per image: two (N, K) -> (N,)."""
    log_p, log_q = logits.float().log_softmax(1), logits_adv.float().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


@contextlib.contextmanager
def attack_mode(model, batchnorm="eval", freeze=True):
    """Lets an attack run the model without leaving a trace in it.

    "eval" puts every submodule in eval mode: BatchNorm uses its running statistics. "train" leaves
    the modes alone (BatchNorm uses the batch's own statistics) but stops it from recording them.
    freeze: the weights want no gradient meanwhile. torch.compile needs that said beforehand, or the
    attack's backward pass computes all of theirs. At the end everything is as it was.
    """
    check_choice("BatchNorm mode", batchnorm, ("eval", "train"))
    before = [(m, m.training) for m in model.modules() if hasattr(m, "training")]
    wanting = [p for p in model.parameters() if freeze and p.requires_grad and not p.is_inference()]
    norms = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    if batchnorm == "eval":
        norms = []  # TorchScript's are constants, and may not even be set to what they are
        model.eval()
    for m in norms:
        m.track_running_stats = False
    for p in wanting:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanting:
            p.requires_grad_(True)
        for m in norms:
            m.track_running_stats = True
        for m, training in before:
            m.training = training


def check_attack(x, y, eps, norm):
    """Raises BadInput for what attacks silently go wrong on: normalised or integer images ..."""
    check_choice("norm", norm, ("linf", "l2"))
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):  # half rounds eps away
        raise BadInput(f"attacks take float32 images (N, C, H, W), not {x.dtype} {tuple(x.shape)}")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise BadInput(f"labels must be int64 of shape ({len(x)},), not {y.dtype} {tuple(y.shape)}")
    if not 0 <= eps <= (1 if norm == "linf" else math.inf):
        raise BadInput(f"eps must be >= 0, in units of [0, 1] such as 8/255, not {eps}")
    if len(x) and not (x.min() >= 0 and x.max() <= 1):
        raise BadInput(
            f"images must lie in [0, 1], found {x.min():.3g} to {x.max():.3g}:"
            " normalisation belongs inside the model"
        )


# ==== 8. Networks: pre-activation residual networks ===============================================


class _SumOverProcesses(torch.autograd.Function):
    """dist.all_reduce for autograd: the gradient of a sum over processes is one too."""

    @staticmethod
    def forward(ctx, x):
        """x summed over the processes."""
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        """The gradient summed over the processes."""
        return _SumOverProcesses.apply(gradient)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose batch is the global batch, also when several processes share it.

    Each process contributes its sums; the sum over processes is differentiable, so that gradients
    are those of the whole batch too. (torch's own SyncBatchNorm does this on GPUs only.)
    """

    def forward(self, x):
        """x (N, C, H, W) -> the same shape, each channel normalised over the global batch."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        x32 = x.float()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _SumOverProcesses.apply(x32.sum((0, 2, 3))) / count
        centred = x32 - mean[:, None, None]
        var = _SumOverProcesses.apply((centred**2).sum((0, 2, 3))) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
                self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each AFTER its BatchNorm and ReLU, and a shortcut around both.

    The 1x1 shortcut sees relu(bn1(x)), as in Rice's and AWP's networks; in Wong's, GradAlign's and
    N-FGSM's it sees x. Initialised as torch does; wide networks elsewhere often by Kaiming fan-out.
    """

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1, self.bn2 = BatchNorm(c_in), BatchNorm(c_out)
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

    Keeping mean and std INSIDE the model means that eps is measured in pixels everywhere and that
    no attack can forget to normalise. Source: He et al. 2016; Zagoruyko & Komodakis 2016 for the
    wide ones.
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
        self.blocks, self.bn = nn.Sequential(*blocks), BatchNorm(c_in)
        self.head = nn.Linear(c_in, num_classes)

    def forward(self, x):
        """Images (N, C, H, W) in [0, 1] -> logits (N, K)."""
        x = self.blocks(self.stem((x - self.mean) / self.std))
        return self.head(F.relu(self.bn(x)).mean((2, 3)))


MODELS = ["small", "preactresnet18", "wrn-28-10", "wrn-34-10"]


def make_model(name="small", num_classes=10, in_channels=3, mean=None, std=None, width=16):
    """A fresh network with its normalisation inside.

    Args: name, one of MODELS; mean and std, per channel in [0, 1] units (default .5 and .25);
        width, channels of the first stage, at least 8; for `small` only.
    Returns: PreActResNet; `.spec` holds what load_model needs to build it again.
    Raises: BadInput.
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
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):  # the caller's random numbers stay as they were
        torch.manual_seed(config.seed)
        return make_model(config.model, len(data.classes), x.shape[1], mean, std, config.width)


def checksum(data):
    """A number that changes with the training images and their labels."""
    number = zlib.crc32(data.y_train.cpu().contiguous().numpy())
    return zlib.crc32(data.x_train.cpu().contiguous().numpy(), number)


# ==== 9. Rivals: MART, WEAT, GradAlign, AWP, and the list of methods ==============================


def mart_loss(logits, logits_adv, y, beta=5.0):
    """(E24) MART: BCE(p(x*), y) + beta * mean KL(p(.|x) || p(.|x*)) (1 - p(y|x)). A scalar.

    BCE = -log p(y|x*) - log(1 - max_{k != y} p(k|x*)), the cross-entropy "boosted" by a margin; the
    factor 1 - p(y|x) lets misclassified images count more. Source: Wang et al. 2020, equation 11.
    """
    p_adv = logits_adv.float().softmax(1)
    rival = p_adv.scatter(1, y[:, None], 0).amax(1)
    miss = -torch.log1p(1e-4 - rival)  # finite where the rival is certain; 1e-4 as its authors
    boosted = F.cross_entropy(logits_adv.float(), y) + miss.mean()
    doubt = 1 - logits.float().softmax(1).gather(1, y[:, None]).squeeze(1)
    return boosted + beta * (kl_per_image(logits, logits_adv) * doubt).mean()


def weat_weights(logits):
    """(E25) WEAT's weights w = 1 / log(1 + exp|E(x)|), detached: (N, K) -> (N,).

    Images of energy near 0, about which the model has learnt least, count most.
    Source: Mirza et al. 2024, section 3.3.
    """
    return 1 / F.softplus(energy_x(logits).abs()).detach()


def weat_nat_loss(logits, logits_adv, y, beta=6.0):
    """(E26) WEAT, natural: mean w (CE(f(x), y) + beta * KL(p(.|x) || p(.|x*))). A scalar."""
    ce = F.cross_entropy(logits.float(), y, reduction="none")
    return (weat_weights(logits) * (ce + beta * kl_per_image(logits, logits_adv))).mean()


def weat_adv_loss(logits, logits_adv, y, beta=6.0):
    """(E27) WEAT, adversarial: mean w (CE(f(x*), y) + beta * KL(p(.|x) || p(.|x*))). A scalar."""
    ce = F.cross_entropy(logits_adv.float(), y, reduction="none")
    return (weat_weights(logits) * (ce + beta * kl_per_image(logits, logits_adv))).mean()


def grad_align(model, x, y, noise):
    """(E28) GradAlign: 1 - mean cos(grad_x CE(x), grad_x CE(x + noise)), noise ~ U(-eps, eps).

    A baseline: catastrophic overfitting shows as a gradient that turns within the ball, so its
    turning is penalised. Needs second derivatives, hence its price: several times FGSM. As in its
    authors' code the gradient at x is a constant, towards which that at x + noise is turned.
    Source: Andriushchenko & Flammarion 2020, equation 5.
    """

    def slope(point, differentiable):
        """Gradient of the loss with respect to the image, flattened: (N, C H W)."""
        point = point.detach().requires_grad_(True)
        loss = F.cross_entropy(model(point).float(), y, reduction="sum")
        return torch.autograd.grad(loss, point, create_graph=differentiable)[0].flatten(1)

    return 1 - F.cosine_similarity(slope(x, False), slope(x + noise, True)).mean()


@contextlib.contextmanager
def adversarial_weights(model, objective, gamma):
    """(E29) AWP: while open, every weight matrix w is shifted by gamma |w| g / |g|, g = dL/dw.

    A baseline against robust overfitting: the loss is made small in a whole neighbourhood of the
    weights. `objective()` returns the loss. Afterwards the weights are restored exactly.
    Source: Wu et al. 2020, section 4.1.
    """
    weights = [w for w in model.parameters() if w.ndim > 1 and w.requires_grad]  # no BatchNorm
    with attack_mode(model, "train", freeze=False):
        gradients = list(torch.autograd.grad(objective(), weights, materialize_grads=True))
    sum_over_processes(gradients)
    before = [w.detach().clone() for w in weights]
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
    """A way of training: where the attack starts, what it climbs, and the loss."""

    start: str  # none: no attack; zero: x; ball, wide: x + U(-r, r), r = eps, 2 eps; gauss: nudged
    loss: object  # (logits, logits_adv, y, beta) -> scalar
    climbs: str = "ce"  # the attack's loss
    multi_step: bool = False
    needs_clean: bool = False  # whether the loss looks at logits of the clean images


METHODS = {
    "none": Method("none", adversarial_loss),
    "fgsm": Method("zero", adversarial_loss),
    "rs-fgsm": Method("ball", adversarial_loss),
    "n-fgsm": Method("wide", adversarial_loss),
    "pgd": Method("ball", adversarial_loss, multi_step=True),
    "trades": Method("gauss", trades_loss, "kl", True, True),
    "mart": Method("gauss", mart_loss, "ce", True, True),
    "weat-nat": Method("gauss", weat_nat_loss, "kl", True, True),
    "weat-adv": Method("gauss", weat_adv_loss, "kl", True, True),
}


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

SHAPES_TRAIN = 5500  # of which val_fraction, 10%, become validation


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


def import_torchvision():
    """Imports torchvision, also where a wheel made for CUDA lies beside a CPU torch.

    There the import stops at "operator torchvision::nms does not exist", although nothing here
    needs that operator. Declaring its signature, without an implementation, is enough.
    """
    try:
        import torchvision
    except RuntimeError:  # another reason than this one shows itself at the second import
        for op in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{op}", signature)
        import torchvision
    import torchvision.datasets  # noqa: F401  (makes torchvision.datasets reachable)

    return torchvision


TORCHVISION_SETS = {  # name: what to put into the data directory where the download does not work
    "cifar10": "cifar-10-python.tar.gz (or the unpacked folder cifar-10-batches-py)",
    "cifar100": "cifar-100-python.tar.gz (or the unpacked folder cifar-100-python)",
    "svhn": "(after pip install scipy, which reads them) train_32x32.mat and test_32x32.mat",
    "mnist": "the four files *-ubyte.gz of MNIST, in MNIST/raw/,",
    "fashion-mnist": "the four files *-ubyte.gz of Fashion-MNIST, in FashionMNIST/raw/,",
}

DATASETS = ["shapes", *TORCHVISION_SETS]

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
    if not 0 < val_fraction < 1:
        raise BadInput(f"val_fraction must be between 0 and 1, not {val_fraction}")
    name, note = str(name), ""
    if name == "shapes":
        test = make_shapes(2000, seed + 1_000_003)
        splits = {"train": make_shapes(SHAPES_TRAIN, seed), "test": test}
        classes = list(SHAPES)
    elif name in TORCHVISION_SETS:
        splits, classes = _load_torchvision(name, data_dir)
    elif name.endswith(".npz"):
        splits, classes = _load_npz(name)
    elif os.path.isdir(name):
        splits, classes, note = _load_folder(name)
    elif os.sep in name:
        raise RunError(f"no data at '{name}': give an .npz file or a folder with train/ and test/")
    else:
        check_choice("data set", name, DATASETS)
    for split, (x, y) in splits.items():
        if len(x) == 0 or x.shape[1:] != splits["train"][0].shape[1:]:
            raise BadInput(f"'{name}': {split} has no images, or images of another size than train")
        if y.min() < 0 or y.max() >= len(classes):
            raise BadInput(f"'{name}': the labels of {split} must lie in 0..{len(classes) - 1}")
    if "val" not in splits:
        x, y = splits["train"]
        count = round(len(y) * val_fraction)
        if not 0 < count < len(y):
            raise BadInput(f"'{name}': {val_fraction:g} of {len(y)} images leaves an empty split")
        held_out = torch.zeros(len(y), dtype=torch.bool)
        held_out[stratified(y, count, seed)] = True
        splits["train"], splits["val"] = (x[~held_out], y[~held_out]), (x[held_out], y[held_out])
    if limit:
        x, y = splits["train"]
        if not len(classes) <= limit <= len(y):
            raise BadInput(f"limit {limit} must lie between {len(classes)} (classes) and {len(y)}")
        chosen = stratified(y, limit, seed)
        splits["train"] = x[chosen], y[chosen]
    if missing := set(range(max(2, len(classes)))) - set(splits["train"][1].tolist()):
        raise BadInput(f"'{name}': class {min(missing)} has no images to train on: number labels"
                       " 0, 1, ..., have two train/<class>/ or more, or raise limit")  # fmt: skip
    return Data(*splits["train"], *splits["val"], *splits["test"], classes, name, note)


def evenly(count, n):
    """`count` indices spread over n rows. (The first rows of a folder are all of one class.)"""
    return torch.arange(min(count, n)) * n // max(min(count, n), 1)


def stratified(y, count, seed):
    """`count` indices into labels y (N,), each class by its share, in a seeded random order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
    by_class = order[torch.argsort(y[order], stable=True)]
    chosen = by_class[torch.arange(count) * len(y) // max(count, 1)]  # every (N / count)-th of them
    return chosen[torch.from_numpy(np.random.default_rng(seed + 1).permutation(count))]


def _to_nchw(images, where):
    """NumPy uint8 (N, H, W) or (N, H, W, C) -> tensor (N, C, H, W), square, C 1 or 3."""
    images = np.asarray(images)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8:
        raise BadInput(f"{where}: images must be uint8 in 0..255, not {images.dtype}")
    square = images.ndim == 4 and images.shape[1] == images.shape[2] >= 8
    if not square or images.shape[3] not in (1, 3):
        raise BadInput(f"{where}: images must be (N, S, S[, 1 or 3]), S >= 8, not {images.shape}")
    if images.size and images.max() < 32:  # zeros and ones, 4 bits: they would be nearly black
        raise BadInput(f"{where}: no value is above {images.max()}; scale images to 0..255")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _load_npz(path):
    """Splits and class names from an .npz with MedMNIST's keys."""
    if not os.path.isfile(path):  # reading a FIFO or a device might never end
        raise RunError(f"no file '{path}', or no regular one")
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {m.filename.removesuffix(".npy"): m.file_size for m in archive.infolist()}
        if (size := sum(sizes.values())) > max(2**30, 200 * os.path.getsize(path)):
            raise OSError(f"a bomb of {size / 2**30:.1f} GB")  # images shrink tenfold, not 200-fold
        keys = [f"{s}_{part}" for s in ("train", "val", "test") for part in ("images", "labels")]
        # allow_pickle=False: a pickle inside an .npz would run its author's code
        with np.load(path, allow_pickle=False) as archive:
            arrays = {k: np.asarray(archive[k]) for k in keys if k in sizes}
    except Exception as error:  # damage brings out a dozen kinds, MemoryError among them
        raise RunError(f"'{path}' cannot be read as an .npz of plain arrays: {error}") from error
    splits = {}
    for split in ["train", "test"] + ["val"] * ("val_images" in arrays or "val_labels" in arrays):
        x, y = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if x is None or y is None:
            has = f"it has: {', '.join(sizes)[:300] or 'nothing'}; wanted: {', '.join(keys)}"
            raise BadInput(f"'{path}' lacks {split}_images or {split}_labels; {has} (val if any)")
        x = _to_nchw(x, f"'{path}' {split}_images")
        if y.shape not in ((len(x),), (len(x), 1)) or y.dtype.kind not in "iu":
            raise BadInput(f"'{path}' {split}_labels: not {len(x)} integers but {y.dtype}{y.shape}")
        splits[split] = x, torch.from_numpy(y.reshape(-1).astype(np.int64))
    y = splits["train"][1].tolist()  # more classes than images cannot be: see load_data
    return splits, [str(k) for k in range(1 + min(max(y, default=-1), len(y)))]


def _read_picture(path):
    """Pixels of a picture (its first frame) as a viewer shows them: uint8 (H, W) or (H, W, 3).

    Turned as its EXIF says; what is transparent, on white. Raises: RunError, naming the file.
    """
    from PIL import Image, ImageOps  # torchvision's own requirement

    try:
        if not os.path.isfile(path):
            raise OSError("no regular file, or a link to nothing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is refused here
            with Image.open(path) as image:  # reads the header only
                if max(image.size) > 4096 or image.mode[0] in "IF":  # or Pillow cuts off at 255
                    raise OSError(f"mode {image.mode}, {image.size}: give 8 bits, up to 4096x4096")
                grey = image.mode in ("1", "L", "LA")
                image = ImageOps.exif_transpose(image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("L" if grey else "RGB"))
    except Exception as error:  # damage brings out a dozen kinds
        raise RunError(f"picture '{path}' cannot be used: {error}") from error


def _find_pictures(folder, seen, left_out):
    """Paths of the pictures in a folder and below it; hidden and other files go to `left_out`.

    `seen`: the folders read so far. A link back to one would double its pictures (in train and
    test: a leak), or never end; so would the second copies in the hidden .ipynb_checkpoints.
    """
    if (real := os.path.realpath(folder)) in seen:
        raise OSError(f"'{folder}' leads to a folder that is read already: remove that link")
    seen.add(real)
    found = []
    for name in sorted(os.listdir(folder)):
        path, hidden = os.path.join(folder, name), name.startswith(".")
        if not hidden and os.path.isdir(path):
            found += _find_pictures(path, seen, left_out)
        else:
            (found if name.lower().endswith(PICTURES) and not hidden else left_out).append(path)
    if not found:
        raise OSError(f"no picture ({', '.join(PICTURES)}) in '{folder}': fill or remove it")
    return found


def _load_folder(path):
    """Splits, class names and a note from a folder with train/<class>/ and test/<class>/."""
    splits, classes, seen, left_out, first = {}, None, set(), [], None
    for split, names in dict(train="train", val="val or valid or validation", test="test").items():
        there = [f for name in names.split(" or ") if os.path.isdir(f := os.path.join(path, name))]
        if split == "val" and not there:
            continue
        if len(there) != 1:
            raise RunError(f"folder '{path}' must have one {names}/ with a folder per class")
        try:
            files = _find_pictures(there[0], seen, left_out)
            first = first or (files[0], _read_picture(files[0]).shape)
            x = np.empty((len(files), *first[1]), np.uint8)
        except (OSError, RecursionError, MemoryError) as error:
            raise RunError(f"folder '{there[0]}' cannot be used: {error}") from error
        kinds = [os.path.relpath(file, there[0]).split(os.sep) for file in files]
        found, y = np.unique([k[0] for k in kinds], return_inverse=True)
        if classes not in (None, found.tolist()) or min(map(len, kinds)) < 2:
            raise BadInput(f"folder '{there[0]}' has pictures in no class, or not train/'s classes")
        classes = found.tolist()
        for i, file in enumerate(files):
            pixels = _read_picture(file)
            if pixels.shape != first[1]:
                raise BadInput(f"'{file}' is {pixels.shape}, '{first[0]}' is {first[1]}: pictures"
                               " need one size, and to be all grey or all in colour")  # fmt: skip
            x[i] = pixels
        splits[split] = _to_nchw(x, f"'{files[0]}' and the others"), torch.from_numpy(y)
    return splits, classes, f"{len(left_out)} hidden or other files left out" * bool(left_out)


def _load_torchvision(name, data_dir):
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
            splits[split] = _to_nchw(images, name), torch.as_tensor(np.asarray(y)).long()
    except Exception as error:  # no host, no disk, or one of the many kinds of damage
        raise RunError(f"{name} could not be downloaded or read ({' '.join(str(error).split())})."
                       f" Put {TORCHVISION_SETS[name]} into '{data_dir}', or name another folder"
                       " with --data-dir") from error  # fmt: skip
    return splits, classes


def as_pixels(x):
    """Images as float in [0, 1]: uint8 is divided by 255, float stays."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def augment(x, how, generator=None):
    """Random crops of a batch, padded by an eighth of the side (4 of 32), and horizontal flips.

    Args: x, images (N, C, H, W) of any dtype; how, "none", "crop" or "crop-flip".
    Returns: images of the same shape and dtype, laid out channels-last.
    """
    check_choice("augmentation", how, ("none", "crop", "crop-flip"))
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


# ==== 11. Judging robustness: APGD, Square, the worst case ========================================


def exact_logits(model, x, batch_size=500, dtype=torch.float32):
    """Logits (N, K) in eval mode and fp32, whatever autocast is on: what claims are judged by.

    x float or uint8 (N, C, H, W). dtype: torch.bfloat16 is faster, for where exactness is no claim.
    """
    with torch.no_grad(), attack_mode(model), autocast(x.device, dtype), true_fp32():
        return torch.cat([model(as_pixels(part)).float() for part in x.split(batch_size)])


def is_right(logits, y):
    """Which images (N,) are classified correctly. NaN or infinite logits are no answer: wrong."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def _has_fallen(model, x_adv, y, logits):
    """Which images (N,) are misclassified: by their logits (N, K) and, if those are rough, in fp32.

    A search in bf16 may only CLAIM success. The claims are few, so checking them costs little.
    """
    wrong = ~is_right(logits, y)
    if (torch.is_autocast_enabled(x_adv.device.type) or x_adv.is_cuda) and wrong.any():
        wrong[wrong.clone()] = ~is_right(exact_logits(model, x_adv[wrong]), y[wrong])
    return wrong


def _checkpoints(steps):
    """The steps at which apgd reconsiders its step size: 22, 41, 57, 70 ... of 100."""
    at, gap, found = 22, 22, []  # percent
    while at <= 100:
        found.append(math.ceil(at * steps / 100))
        gap = max(gap - 3, 6)
        at += gap
    return found


def apgd(model, x, y, eps, steps=100, *, norm="linf", loss="ce", target=None, start=None,
         until_fooled=True, generator=None, validate=True):  # fmt: skip
    """(E30) Auto-PGD: projected gradient ascent with momentum that finds its own step size.

        z       = project(x_k + step * direction)
        x_{k+1} = project(x_k + .75 (z - x_k) + .25 (x_k - x_{k-1}))

    step begins at 2 eps. At a checkpoint (see _checkpoints) an image's step is halved, and it goes
    back to its best point, if fewer than 75% of the steps since the last checkpoint raised the
    loss, or if neither step nor best loss have changed since. An image that is misclassified leaves
    the batch, so the cost follows those that still stand.

    Args:
        loss, target: one of ATTACK_LOSSES; with dlr also labels (N,) to reach.
        start: default a uniform draw from the ball, ONE for all images, so that what happens to
            an image does not depend on the rest of its batch.
        until_fooled: False goes on to the last step for every image.
        The others as for pgd.
    Returns: x_adv, like x: the first misclassified point; else, or with until_fooled=False, the
        point of the highest loss. Raises: BadInput. Source: Croce & Hein 2020, algorithm 1.
    """
    if validate:
        check_attack(x, y, eps, norm)
    if start is None:
        start = (x + random_noise(x[:1], eps, norm, generator)).clamp(0, 1)
    x, start = x.detach(), start.detach()
    least = x.new_full((len(x),), -math.inf, dtype=torch.float32)
    now = {  # all that the search knows, one row per image that still stands
        "rows": torch.arange(len(x), device=x.device), "x": x, "y": y, "at": start, "before": start,
        "best": start, "best_gradient": start, "best_value": least, "value": least,
        "value_at_check": least, "step": x.new_full((len(x), 1, 1, 1), 2 * eps),
        "rises": torch.full_like(y, -1),  # the first value exceeds -inf, which is no rise
        "halved": torch.ones_like(y, dtype=torch.bool),  # so nothing is "stuck" at checkpoint one
    }  # fmt: skip
    found, checkpoints, last_check = start.clone(), _checkpoints(steps), 0
    with attack_mode(model):
        extra = {"target": target, "reference": model(x).detach() if loss == "kl" else None}
        now |= {k: v for k, v in extra.items() if v is not None}
        for k in range(steps + 1):
            extra = now.get("reference"), now.get("target")
            value, gradient, logits = value_and_gradient(model, now["at"], now["y"], loss, *extra)
            better = value > now["best_value"]
            now["rises"] = now["rises"] + (value > now["value"])
            now |= {"value": value, "gradient": gradient}
            _move(now, better, best="at", best_gradient="gradient", best_value="value")
            if until_fooled:
                fallen = _has_fallen(model, now["at"], now["y"], logits)
                found[now["rows"][fallen]] = now["at"][fallen]
                now = {k: v[~fallen] for k, v in now.items()} if fallen.any() else now
            if k == steps or not len(now["rows"]):
                break
            if k in checkpoints:
                _halve_steps(now, 0.75 * (k - last_check))
                last_check = k
            at, a = now["at"], 0.75 if k else 1.0  # k = 0: no momentum yet
            z = project(ascend(at, now["gradient"], now["step"], norm), now["x"], eps, norm)
            z = (at - now["before"]).mul_(1 - a).add_(z, alpha=a).add_(at, alpha=1 - a)
            now |= {"at": project(z, now["x"], eps, norm), "before": at}
    found[now["rows"]] = now["best"]
    return found


def _move(now, where, **pairs):
    """In the rows marked by where (N,), now[a] becomes now[b], for each a="b"."""
    for a, b in pairs.items():
        mask = where.view(-1, *[1] * (now[a].ndim - 1))
        now[a] = torch.where(mask, now[b], now[a])


def _halve_steps(now, enough):
    """A checkpoint of apgd: halves the steps that have been too long, from the best point on."""
    unsteady = now["rises"] < enough
    stuck = ~now["halved"] & (now["best_value"] <= now["value_at_check"])
    now |= {"halved": unsteady | stuck, "half": now["step"] / 2}
    _move(now, now["halved"], step="half", at="best", gradient="best_gradient", value="best_value")
    now |= {"value_at_check": now["best_value"], "rises": now["rises"] * 0}


def apgd_t(model, x, y, eps, steps=100, targets=9, *, norm="linf", generator=None,
           validate=True):  # fmt: skip
    """(E31) Targeted APGD: towards each of the likeliest wrong classes in turn, with (E22).

    Args: targets, how many classes at most (all wrong ones of 2 to 10 classes; with 100, the 9
        likeliest). The others as for apgd; an image that has fallen is not attacked again.
    Returns: x_adv, like x: the first misclassified point, else that with the largest margin.
    Raises: BadInput.
    Source: Croce & Hein 2020.
    """
    if validate:
        check_attack(x, y, eps, norm)
    x_adv, logits = x.detach().clone(), exact_logits(model, x)
    ranking = logits.scatter(1, y[:, None], -math.inf).topk(min(targets, logits.shape[1] - 1), 1)
    best = torch.full_like(logits[:, 0], -math.inf)  # margin of x_adv, (N,); above 0 it has fallen
    options = dict(norm=norm, loss="dlr", generator=generator, validate=False)
    for t in ranking.indices.T:  # (N,): every image's next likeliest class
        rows = (best <= 0).nonzero()[:, 0]
        if not len(rows):
            break
        found = apgd(model, x[rows], y[rows], eps, steps, target=t[rows], **options)
        logits = exact_logits(model, found)
        margin = attack_loss(logits, y[rows], "margin").where(logits.isfinite().all(1), math.inf)
        better = margin > best[rows]
        x_adv[rows[better]], best[rows[better]] = found[better], margin[better]
    return x_adv


def _window_side(done, h, w):
    """Side of square's window, in pixels, when a share `done` of the queries is spent."""
    halvings = sum(done > at for at in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))  # area
    return min(max(round(math.sqrt(0.8 / 2**halvings * h * w)), 1), h, w)


@torch.no_grad()
def square(model, x, y, eps, queries=5000, *, norm="linf", generator=None, validate=True):
    """(E32) Square attack: random search on the margin that looks at logits only, at no gradient.

    It begins with vertical stripes. Each query repaints a random square window with colours at the
    border of the l_inf ball and is kept if the margin grew. The window shrinks from 80% of the
    image's area to 0.2% by a fixed schedule. What PGD cannot break only because gradients are
    useless, this can.

    Args: queries, the most that are spent on an image; it leaves the batch when it falls. All
        images see the same windows and signs, so no result depends on the rest of the batch. norm:
        "linf" (the authors' form for l_2 is left out). The others as for pgd.
    Returns: x_adv, like x. Raises: BadInput.
    Source: Andriushchenko et al. 2020, section 3.
    """
    if validate:
        check_attack(x, y, eps, norm)
    check_choice("norm of square", norm, ("linf",))
    c, h, w = x.shape[1:]
    draw = dict(generator=generator, device=x.device)
    corners = torch.rand(queries, 2, **draw).tolist()
    signs = torch.rand(queries, c, 1, 1, **draw).sub(0.5).sign().to(x.dtype)
    stripes = torch.rand(c, 1, w, **draw).sub(0.5).sign().to(x.dtype)
    x_adv = (x + eps * stripes).clamp(0, 1)
    found, rows = x_adv.clone(), torch.arange(len(x), device=x.device)
    best = x.new_full((len(x),), -math.inf, dtype=torch.float32)
    with attack_mode(model):
        for query in range(queries):
            candidate = x_adv
            if query:
                side = _window_side(query / queries, h, w)
                top, left = (int(at * (n - side + 1)) for at, n in zip(corners[query], (h, w)))
                window = ..., slice(top, top + side), slice(left, left + side)
                candidate = x_adv.clone()
                candidate[window] = (x[window] + eps * signs[query]).clamp(0, 1)
            logits = model(candidate)
            margin = attack_loss(logits, y, "margin")
            better = margin > best
            best = torch.where(better, margin, best)
            x_adv = torch.where(better.view(-1, 1, 1, 1), candidate, x_adv)
            fallen = _has_fallen(model, candidate, y, logits)
            if fallen.any():
                found[rows[fallen]] = candidate[fallen]
                rows, x, y, x_adv, best = (t[~fallen] for t in (rows, x, y, x_adv, best))
            if not len(rows):
                break
    found[rows] = x_adv
    return found


@dataclass(frozen=True)
class Attack:
    """An attack of this section with its settings, as robust_accuracy runs it."""

    function: object
    settings: dict = field(default_factory=dict)
    start: float = 0.0  # radius of the random start in units of eps; 0: the attack's own affair
    target: str = ""  # the label to reach, where there is one: "random" or "least" (likely)
    exact: bool = False  # needs no gradient; searches in fp32, as bf16 hides its small gains


ATTACKS = {
    "fgsm": Attack(fgsm),
    "rs-fgsm": Attack(rs_fgsm, {}, 1.0),
    "n-fgsm": Attack(n_fgsm, {}, 2.0),  # leaves the ball, so it hardly ever counts
    "pgd": Attack(pgd, {"steps": 20}, 1.0),
    "pgd-margin": Attack(pgd, {"steps": 20, "loss": "margin"}, 1.0),  # Carlini & Wagner's loss
    "pgd-kl": Attack(pgd, {"steps": 20, "loss": "kl"}, 1.0),
    "pgd-dlr": Attack(pgd, {"steps": 20, "loss": "dlr"}, 1.0),
    "energy-down": Attack(pgd, {"steps": 20, "loss": "energy"}, 1.0),
    "energy-up": Attack(apgd, {"steps": 40, "loss": "energy-up", "until_fooled": False}),
    "pgd-t-random": Attack(pgd, {"steps": 20}, 1.0, "random"),
    "pgd-t-least": Attack(pgd, {"steps": 20}, 1.0, "least"),
    "apgd-ce": Attack(apgd, {"steps": 100}),
    "apgd-dlr": Attack(apgd, {"steps": 100, "loss": "dlr"}),
    "apgd-t": Attack(apgd_t, {"steps": 100}),
    "square": Attack(square, {"queries": 5000}, exact=True),
}


SUITES = {
    "quick": ["fgsm", "pgd", "pgd-margin"],
    "standard": ["apgd-ce", "apgd-t", "square"],  # AutoAttack without FAB-T
    "energy": [a for a in ATTACKS if a not in ("n-fgsm", "apgd-dlr", "square")],
    "all": list(ATTACKS),
}


def run_attack(name, model, x, y, eps, norm="linf", seed=0, restarts=1, **settings):
    """Runs the attack `name` on images: fgsm's arguments, and settings such as steps=50.

    All randomness comes from (seed, name) and is the same for every image: what happens to an image
    depends neither on its place nor on its batch. restarts, of attacks that start at random
    (PGD's, RS- and N-FGSM): what still stands is attacked again. Returns: x_adv, like x.
    Raises: BadInput.
    """
    check_choice("attack", name, ATTACKS)
    if restarts > 1 and ATTACKS[name].start:
        x_adv = run_attack(name, model, x, y, eps, norm, seed, **settings)
        for again in range(seed + 1, seed + restarts):
            rows = is_right(exact_logits(model, x_adv), y).nonzero()[:, 0]
            if len(rows):
                part = x[rows], y[rows]
                x_adv[rows] = run_attack(name, model, *part, eps, norm, again, **settings)
        return x_adv
    for setting in settings:
        check_choice("attack setting", setting, {k for a in ATTACKS.values() for k in a.settings})
    attack = ATTACKS[name]
    options = attack.settings | {a: v for a, v in settings.items() if a in attack.settings}
    generator = torch.Generator(x.device).manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    if attack.start:
        noise = random_noise(x[:1], attack.start * eps, norm, generator)
        options["start"] = (x + noise).clamp(0, 1)
    elif attack.function is not fgsm:
        options["generator"] = generator
    if attack.target:
        logits, options["targeted"] = exact_logits(model, x), True
        if attack.target == "least":
            y = logits.scatter(1, y[:, None], math.inf).argmin(1)
        else:  # another class, drawn once for every class
            k = logits.shape[1]
            away = torch.randint(1, k, (k,), generator=generator, device=x.device)
            y = (y + away[y]) % k
    return attack.function(model, x, y, eps, norm=norm, **options)


def try_gradient(model, x, y, dtype=torch.float32):
    """The gradient of a real attack step (N, C, H, W). Raises: BadInput where there can be none."""
    try:
        with attack_mode(model), autocast(x.device, dtype):
            return input_gradient(model, x, y)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a stranger's model raises
        why = f"{' '.join(str(error).split())[:200]}); --attacks square can"
        raise BadInput(f"gradient attacks cannot run in {str(dtype)[6:]} ({why}") from error


def check_model(model, x, y, names=("square",)):
    """The clean logits, fp32 (N, K). Raises BadInput where model, images and attacks do not fit."""
    place = next((p.device for p in model.parameters()), x.device)
    if not place == x.device == y.device:
        raise BadInput(f"model on {place}, images on {x.device}, labels on {y.device}: move them")
    if not len(x):
        raise BadInput("no images to attack")
    try:
        logits = exact_logits(model, x)
        exact_logits(model, x[:1])  # what has fallen leaves the batch: one image may remain
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a stranger's model raises
        images = f"images of shape {tuple(x.shape[1:])}, in batches of any size"
        raise BadInput(f"the model does not take {images}: {error}") from error
    if logits.ndim != 2 or (k := logits.shape[1]) < 2:
        raise BadInput(f"a classifier gives logits (N, K), K >= 2, not {tuple(logits.shape)}")
    if not logits.isfinite().all():
        raise BadInput("the model gives NaN or infinite logits on clean images")
    if y.min() < 0 or y.max() >= k:
        raise BadInput(f"labels from {y.min()} to {y.max()}, but the model has {k} classes")
    if not all(ATTACKS[name].exact for name in names):
        try_gradient(model, x[:2], y[:2])
    return logits


def _row(name, logits, logits_adv, x, x_adv, y, **more):
    """One line of the table: how a set of images fared; means over them, and E(x*) of each."""
    moved, energy = (x_adv - x).flatten(1), energy_x(logits_adv)
    finite = logits_adv.isfinite().all(1)  # the others have an accuracy, 0, but no energy
    means = {
        "energy": energy, "delta_energy": delta_energy(logits, logits_adv),
        "delta_energy_xy": delta_energy(logits, logits_adv, y),
        "cross_entropy": attack_loss(logits_adv, y),
        "linf": moved.abs().amax(1), "l2": moved.norm(dim=1),
    }  # fmt: skip
    means = {k: v[finite].mean().item() for k, v in means.items()}
    counts = {"n": len(x), "accuracy": is_right(logits_adv, y).float().mean().item()}
    more |= {"nonfinite": int((~finite).sum()), "energies": energy[finite].cpu()}
    return {"attack": name, **counts, **means, **more}


def _inside(x_adv, x, eps, norm):
    """Which images (N,) lie in the ball and in [0, 1], but for rounding."""
    moved = (x_adv - x).flatten(1)
    size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    low, high = x_adv.flatten(1).aminmax(dim=1)
    return (size <= eps * (1 + 1e-5) + 1e-6) & (low >= 0) & (high <= 1)


def attacks_of(suite, norm="linf"):
    """The names in a suite, or in a list of names; refuses those that are unknown in that norm."""
    known = [name for name in ATTACKS if norm == "linf" or name != "square"]
    if isinstance(suite, str):
        check_choice("suite", suite, SUITES)
        return [name for name in SUITES[suite] if name in known]
    for name in suite:
        check_choice(f"attack in {norm}", name, known)
    return suite


def _plan(model, x, y, suite, norm, precision, numbers):
    """What robust_accuracy begins with: clean logits, names of attacks, dtype of search, notes."""
    for setting, value in numbers.items():
        if value < 1:
            raise BadInput(f"{setting} must be at least 1, not {value}")
    names, dtype = attacks_of(suite, norm), pick_precision(precision, x.device)
    left_out = isinstance(suite, str) and names != SUITES[suite]
    notes = ["Square is left out: it attacks in linf only."] * left_out
    clean = check_model(model, x, y, names)
    if dtype != torch.float32 and not all(ATTACKS[name].exact for name in names):
        try:
            try_gradient(model, x[:2], y[:2], dtype)
        except BadInput as error:
            dtype, notes = torch.float32, [*notes, f"Searched in fp32: {error}."]
    return clean, names, dtype, notes


@torch.no_grad()
def robust_accuracy(model, x, y, eps, suite="standard", norm="linf", *, seed=0, batch_size=500,
                    precision="auto", on_progress=None, **settings):  # fmt: skip
    """(E33) Accuracy under the worst of several attacks, image by image, and their energies.

    An image has fallen when it is misclassified, or when an attack has found a point in its ball
    and in [0, 1] that is misclassified in plain fp32 (the search itself may run in bf16). The suite
    "standard", AutoAttack without FAB-T (which changed 0 of 600 images), attacks only what still
    stands, so its rows speak of ever fewer images; in the others energies can be compared.

    Args:
        model, x, y, eps, norm: as for fgsm; the model on the images' device.
        suite: a name of SUITES, or a list of names of ATTACKS.
        batch_size: on it only speed and memory depend; precision: see pick_precision.
        on_progress: called as (rows so far, attack, images done, images in all) after every batch.
        settings: steps, queries and restarts, for the attacks that have them.
    Returns: dict: clean_acc, robust_acc; x_adv (N, C, H, W), where an image fell, else x; fallen
        (N,); rows, natural images first: the means of _row over the n images attacked, worst
        (robust accuracy of ALL images so far), outside (wrong, but out of the ball: not counted),
        nonfinite (logits: counted as wrong), gradients and queries per image, seconds; notes.
    Raises: BadInput. Source: Croce & Hein 2020 (worst case); Mirza et al. 2024 (energies).
    """
    check_attack(x, y, eps, norm)
    began, numbers = time.perf_counter(), settings | {"batch_size": batch_size}
    clean, names, dtype, notes = _plan(model, x, y, suite, norm, precision, numbers)
    fallen, worst = ~is_right(clean, y), x.clone()
    row = {"worst": (~fallen).float().mean().item(), "outside": 0, "gradients": 0.0, "queries": 1.0}
    rows = [_row("natural", clean, clean, x, x, y, **row, seconds=time.perf_counter() - began)]

    def count(_, inputs):
        """Counts the images that pass through the model, with a gradient or without."""
        counts["gradients" if torch.is_grad_enabled() else "queries"] += len(inputs[0])

    net = nn.Sequential(model)  # around it, since TorchScript takes no hooks
    net.register_forward_pre_hook(count)
    for name in names:
        began, counts = time.perf_counter(), {"gradients": 0, "queries": 0}
        chosen = (~fallen if suite == "standard" else torch.ones_like(fallen)).nonzero()[:, 0]
        if not len(chosen):
            break
        found, search = [], torch.float32 if ATTACKS[name].exact else dtype
        for part in chosen.split(batch_size):
            with autocast(x.device, search):
                found.append(run_attack(name, net, x[part], y[part], eps, norm, seed, **settings))
            if on_progress:
                on_progress(rows, name, sum(map(len, found)), len(chosen))
        x_adv, x_part, y_part = torch.cat(found), x[chosen], y[chosen]
        logits = exact_logits(model, x_adv)
        spent = {k: v / len(chosen) for k, v in counts.items()}
        spent["seconds"] = time.perf_counter() - began
        wrong, inside = ~is_right(logits, y_part), _inside(x_adv, x_part, eps, norm)
        fell = wrong & ~fallen[chosen] & inside
        worst[chosen[fell]] = x_adv[fell]
        fallen[chosen[fell]] = True
        share = {"worst": (~fallen).float().mean().item(), "outside": int((wrong & ~inside).sum())}
        rows.append(_row(name, clean[chosen], logits, x_part, x_adv, y_part, **share, **spent))
    found = {"clean_acc": rows[0]["worst"], "robust_acc": rows[-1]["worst"], "rows": rows}
    return found | {"x_adv": worst, "fallen": fallen, "notes": notes}


@torch.no_grad()
def masking_signs(model, x, y, eps, norm="linf", rows=(), most=200):
    """Reasons to distrust a robust accuracy: a list of sentences, empty if nothing was noticed.

    Gradients that lead nowhere make a model LOOK robust. Tried on `most` of the images: are there
    logits at all, the same ones twice and in any batch, are gradients zero, does one step beat
    many, does a ball that can erase every image leave some standing; and in the `rows` of
    robust_accuracy: did Square, which uses no gradient, break what gradient attacks could not?

    Arguments as for robust_accuracy. Source: Athalye et al. 2018; Carlini et al. 2019, section 4.
    """
    x, y = (t[evenly(most, len(t)).to(t.device)] for t in (x, y))
    logits = exact_logits(model, x)
    grey_eps = 0.5 if norm == "linf" else 0.5 * x[0].numel() ** 0.5  # reaches grey from anywhere
    probabilities = (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all()
    again = (exact_logits(model, x) - logits).abs().max() > 0.01 * logits.abs().max()
    alone = (exact_logits(model, x[:20], 1) - logits[:20]).abs().max() > 0.01 * logits.abs().max()
    broken = sum(row.get("nonfinite", 0) for row in rows)
    unsteady = [
        (again, "Asked twice, the model gives other logits (dropout left on?): results vary."),
        (alone and not again, "Alone, an image gets other logits than in a batch: results vary."),
        (broken, f"{broken} attacked points have NaN or infinite logits: they count as fallen."),
    ]  # fmt: skip
    try:
        zero = (try_gradient(model, x, y).flatten(1) == 0).all(1).float().mean().item()
    except BadInput as error:  # Square alone can attack such a model, and has its say all the same
        return [sentence for noticed, sentence in unsteady if noticed] + [f"Beware: {error}."]

    def left(name, size):
        """Accuracy that an attack of that size leaves."""
        x_adv = run_attack(name, model, x, y, size, norm, steps=10)
        return is_right(exact_logits(model, x_adv), y).float().mean().item()

    one, many, grey = left("fgsm", eps), left("pgd", eps), left("pgd", grey_eps)
    drops = [rows[i - 1]["worst"] - row["worst"] for i, row in enumerate(rows) if row["attack"]
             == "square" and any(before["gradients"] > 1 for before in rows[:i])]  # fmt: skip
    drop = max([0.0, *drops])
    alarm = OverfittingMonitor()  # section 4: the same thresholds
    signs = unsteady + [  # (noticed?, what to say)
        (probabilities, "The model gives probabilities, not logits (a softmax at its end?):"
         " gradients shrink and energies mean nothing; attack it without the softmax."),
        (energy_x(logits).abs().max() < 1e-3, "The model gives log-probabilities: E(x) is 0 for"
         " every image; energies need the logits before log_softmax."),
        (zero > 0.1, f"The gradient of the loss is exactly zero for {zero:.0%} of the images:"
         " gradient attacks cannot see where to go."),
        (one < many - 0.02, f"One step (FGSM, {one:.1%} left) hurts more than ten (PGD-10,"
         f" {many:.1%}): the gradient misleads; trust the worst case at most."),
        (one - many >= alarm.co_gap and many <= alarm.co_ratio * one, f"FGSM leaves {one:.1%} right"
         f" but PGD-10 only {many:.1%}: catastrophic overfitting; accuracy under FGSM says nothing"
         " here."),
        (grey > 0.1, f"PGD with eps {grey_eps:.3g}, enough to turn every image grey, leaves"
         f" {grey:.1%} right: the attack does not work on this model."),
        (drop > 0.01, f"Square, which uses no gradient, broke {drop:.1%} of the images,"
         " all of which the attacks before it had left standing: gradients may be masked."),
    ]  # fmt: skip
    return [sentence for noticed, sentence in signs if noticed]


# ==== 12. Judging pictures: metrics for generated images ==========================================


# Good pictures look like real ones to a JUDGE, a network that did not make them, and are not copies
# of training images. Each function takes tensors only: features (N, F), probabilities (N, K).


@torch.no_grad()
def judge_images(judge, x, batch_size=500, on_progress=None):
    """What a judge sees in images: penultimate features (N, F) and probabilities (N, K).

    The features are what its last linear layer is given, caught there by a hook, so that any
    classifier can be a judge. Args: x (N, C, H, W), uint8 or float in [0, 1]; on_progress, called
    with the number of images done.
    """
    linear = [m for m in judge.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise BadInput("a judge needs a linear layer: its input is taken as the features")
    features, probabilities = [], []
    hook = linear[-1].register_forward_pre_hook(lambda _, given: features.append(given[0].float()))
    with hook, attack_mode(judge):
        for xb in x.split(batch_size):
            xb = as_pixels(xb).contiguous(memory_format=torch.channels_last)
            probabilities.append(judge(xb).float().softmax(1))
            if on_progress:
                on_progress(sum(len(p) for p in probabilities))
    return torch.cat(features), torch.cat(probabilities)


def inception_score(probabilities, splits=10):
    """(E34) IS = exp(mean_x KL(p(y|x) || p(y))), p(y) = mean_x p(y|x): from 1 to K, high is good.

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
    """(E35) FD = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), between two sets of features.

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
    """(E36) Improved precision and recall: how real the fakes are, how much of the real they cover.

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
    """(E37) Share of images whose class the judge recognises: (N, K), (N,) -> float in [0, 1]."""
    return (probabilities.argmax(1) == y).float().mean().item()


# ==== 13. Settings: the configuration, the recipes ================================================


def _opt(default, panel, note):
    """A field of Config: its default, its group in --help, and its note, shown there too."""
    return field(default=default, metadata={"note": note, "panel": panel})


@dataclass
class Config:
    """Every setting of a training run, with the default of the demonstration (shapes, FGSM).

    Skip it on first reading: each name is explained where it is used. `recipe`
    gives the defaults that suit another data set or method. All values are plain Python,
    so that a checkpoint can store them and be read without running any code.
    """

    # fmt: off
    dataset: str = _opt("shapes", "Data", "shapes, cifar10, cifar100, svhn, mnist, fashion-mnist,"
                        " FILE.npz, or a FOLDER with train/ and test/")
    data_dir: str = _opt("data", "Data", "where torchvision's data sets lie or are downloaded to")
    limit: int = _opt(0, "Data", "train on that many images, stratified; 0 = all")
    val_fraction: float = _opt(0.1, "Data", "share of train held out, to choose 'best' on")
    augment: str = _opt("none", "Data", "none, crop (padded by side / 8), or crop-flip")
    model: str = _opt("small", "Model", "small, preactresnet18, wrn-28-10, or wrn-34-10")
    width: int = _opt(16, "Model", "channels of the first stage of the small model, at least 8")
    method: str = _opt("fgsm", "Method", "none, fgsm, rs-fgsm, n-fgsm, pgd, trades, mart, weat-nat,"
                       " weat-adv")
    eps: float = _opt(20 / 255, "Method", "radius of the attack's ball; write 8/255")
    eps_warmup: float = _opt(3.0, "Method", "epochs over which eps grows linearly from 0")
    norm: str = _opt("linf", "Method", "linf or l2: how the ball is measured")
    attack_steps: int = _opt(10, "Method", "steps of the training attack (multi-step methods)")
    attack_step: float = _opt(0.0, "Method", "its step size, in [0, 1] pixels; 0: eps / 4")
    attack_bn: str = _opt("train", "Method", "BatchNorm inside the training attack: eval or train")
    method_beta: float = _opt(6.0, "Method", "weight of the KL term of trades, mart and weat")
    der: bool = _opt(False, "Regularizers", "add the Delta Energy Regularizer")
    beta: float = _opt(1.5, "Regularizers", "weight of DER, in loss per nat of delta energy")
    gamma: float = _opt(0.0, "Regularizers", "delta energy that DER leaves alone, in nats")
    der_on: str = _opt("all", "Regularizers", "which images DER presses: all, or abnormal (AAEs)")
    der_from: float = _opt(0.0, "Regularizers", "share of the epochs after which DER is on")
    der_ramp: float = _opt(0.7, "Regularizers", "share of the epochs over which beta then grows"
                           " linearly to its value; 0: at once")
    grad_align: float = _opt(0.0, "Regularizers", "weight of GradAlign; 0 = off")
    awp: float = _opt(0.0, "Regularizers", "gamma of adversarial weight perturbation; 0 = off")
    awp_warmup: int = _opt(0, "Regularizers", "epochs before AWP begins")
    epochs: int = _opt(20, "Optimisation", "passes over the training images")
    batch_size: int = _opt(64, "Optimisation", "images per step, over all processes")
    lr: float = _opt(0.2, "Optimisation", "highest learning rate of SGD")
    schedule: str = _opt("triangular", "Optimisation", "triangular, piecewise, cosine, or constant")
    lr_peak: float = _opt(0.4, "Optimisation", "share of the epochs at which triangular peaks")
    lr_drops: str = _opt("0.5,0.75", "Optimisation", "shares of the epochs at which piecewise falls"
                         " to a tenth")
    momentum: float = _opt(0.9, "Optimisation", "momentum of SGD")
    weight_decay: float = _opt(5e-4, "Optimisation", "L2 penalty of SGD, on every parameter")
    ema: float = _opt(0.0, "Optimisation", "decay of averaged weights, then judged; 0 = off")
    on_overfit: str = _opt("continue", "Overfitting", "at an alarm: continue, stop, rollback, der")
    probe_size: int = _opt(400, "Overfitting", "validation images measured every epoch, and half as"
                           " many of test, a quarter of train")
    probe_every: int = _opt(200, "Overfitting", "steps between the cheap checks inside an epoch")
    test_size: int = _opt(0, "Overfitting", "test images that judge last and best; 0 = all")
    seed: int = _opt(0, "Machine", "weights, order, augmentation and noise follow from it")
    device: str = _opt("auto", "Machine", "auto, cpu, cuda, cuda:1, mps")
    threads: int = _opt(0, "Machine", "CPU threads; 0: one for the small model, else all cores")
    precision: str = _opt("auto", "Machine", "auto (bf16 where the hardware has it), bf16, or fp32")
    compile: bool = _opt(False, "Machine", "run the network through torch.compile")
    # fmt: on


PRESETS = {
    # Few images, many epochs, a learning-rate drop: what RO needs (Rice et al. 2020).
    # With --der: from the first drop of the rate on; at .8 there would be little left to save.
    "ro": dict(dataset="shapes", method="pgd", limit=200, width=32, eps=12 / 255, eps_warmup=0.0,
               attack_steps=5, batch_size=50, lr=0.1, schedule="piecewise", epochs=80,
               probe_size=200, test_size=1000, der_from=0.5),
}  # fmt: skip


def recipe(dataset="shapes", method="fgsm", **given):
    """The Config that suits a data set and a method; `given` settings override it.

    shapes keeps Config's defaults, the demonstration. Elsewhere eps is 8/255, and
        single-step methods: Wong et al. 2020 (30 epochs, triangular to .2); SVHN: de Jorge et al.
            2022 (lr .05, eps growing for 5 epochs); GradAlign: its authors' lr .3;
        pgd, none: Rice et al. 2020 (200 epochs, .1 falling at 50% and 75%; SVHN .01, step 1/255);
        trades, mart, weat: their authors' epochs, drops, weight decay, and attack in eval mode.
    In l_2 eps is 128/255 everywhere. DER is the paper's, but on shapes with single-step methods:
    there all images, with a beta that grows, kept more robustness (tutorials/results/README.md).
    Raises: BadInput.
    """
    check_choice("method", method, METHODS)
    for name in given:
        check_choice("setting", name, vars(Config()))
    config, how = Config(dataset=str(dataset), method=method), METHODS[method]
    svhn, wide = dataset == "svhn", str(given.get("model")).startswith("wrn")
    usual = {}
    if dataset != "shapes":
        # Mirrored only where that is known to do no harm: a mirrored digit is another sign.
        mirrored = dataset in ("cifar10", "cifar100")
        usual |= dict(model="preactresnet18", eps=8 / 255, eps_warmup=0.0, epochs=30, lr_peak=0.5,
                      batch_size=128, probe_size=1000,
                      val_fraction=0.02 if dataset in DATASETS else 0.1,  # published: none
                      augment="crop-flip" if mirrored else "crop")  # fmt: skip
        if how.multi_step or method == "none":
            usual |= dict(epochs=200, lr=0.1, schedule="piecewise")
            usual |= dict(lr=0.01, attack_step=1 / 255) if svhn else {}
        else:  # the paper's DER against collapse: on abnormal images, from the start
            usual |= dict(beta=0.1 if method == "n-fgsm" else 0.5, der_on="abnormal", der_ramp=0.0)
            if svhn:
                usual |= dict(lr=0.05, eps_warmup=5.0)
            elif given.get("grad_align"):
                usual |= dict(lr=0.3)
        if method == "trades":
            usual |= dict(epochs=76, lr_drops="0.98684", weight_decay=2e-4)  # 75 of 76
            usual |= dict(awp_warmup=10) if given.get("awp") else {}
        if method == "mart":
            usual |= dict(epochs=120, lr_drops="0.625,0.75,0.833")
            usual |= dict(weight_decay=7e-4) if wide else dict(lr=0.01, weight_decay=3.5e-3)
        if method.startswith("weat"):
            usual |= dict(epochs=100, lr_drops="0.75,0.9")
    if how.start == "gauss":
        usual |= dict(attack_bn="eval")
    if method == "mart":
        usual |= dict(method_beta=5.0)
    if how.multi_step:  # the paper's DER against robust overfitting: late, on all images
        usual |= dict(beta=6.0, gamma=0.2, der_from=0.8, der_ramp=0.0)
    if given.get("norm") == "l2":
        usual |= dict(eps=128 / 255)  # 20/255 and 8/255 would be next to nothing
        usual |= dict(attack_step=15 / 255) if how.multi_step else {}
    config = dataclasses.replace(config, **usual)
    config = dataclasses.replace(config, **given)
    if "eps_warmup" not in given:
        config.eps_warmup = min(config.eps_warmup, config.epochs / 4)
    check_config(config)
    return config


def check_config(config):
    """Refuses settings that cannot work, with what to do instead.

    Raises: BadInput.
    """
    for kind, choices in (
        ("model", MODELS), ("method", METHODS), ("norm", ("linf", "l2")), ("schedule", SCHEDULES),
        ("augment", ("none", "crop", "crop-flip")), ("on_overfit", REACTIONS),
        ("attack_bn", ("train", "eval")), ("der_on", ("all", "abnormal")),
        ("precision", ("auto", "bf16", "fp32")),
    ):  # fmt: skip
        check_choice(kind, getattr(config, kind), choices)
    least = dict.fromkeys(("epochs", "batch_size", "attack_steps", "probe_size", "probe_every"), 1)
    for name, smallest in (least | {"width": 8, "batch_size": 2}).items():  # 1: no batch statistics
        if getattr(config, name) < smallest:
            raise BadInput(f"{name} must be at least {smallest}, not {getattr(config, name)}")
    for name in ("threads", "attack_step", "awp_warmup", "eps_warmup", "beta", "gamma", "awp",
                 "method_beta", "grad_align", "weight_decay", "limit", "test_size",
                 "seed"):  # fmt: skip
        if not 0 <= getattr(config, name) < math.inf:
            raise BadInput(
                f"{name} must not be negative or infinite, but is {getattr(config, name)}"
            )
    shares = [config.lr_peak, *config.lr_drops.split(",")]
    with contextlib.suppress(ValueError):
        shares = [float(share) for share in shares]
    if not all(isinstance(share, float) and 0 < share < 1 for share in shares):
        raise BadInput("lr_peak and lr_drops are shares of the epochs, such as 0.5,0.75")
    if not 0 < config.lr < math.inf:
        raise BadInput(f"lr must be positive, not {config.lr}")
    if not (0 <= config.momentum < 1 and 0 <= config.ema < 1):
        raise BadInput("momentum and ema must lie in [0, 1)")
    if not (0 <= config.der_from < 1 and 0 <= config.der_ramp < math.inf):
        raise BadInput("der_from and der_ramp are shares of the epochs: 0 <= der_from < 1")
    if config.seed >= 2**32:
        raise BadInput(f"seed must be below 2**32, not {config.seed}")
    if config.eps_warmup >= config.epochs:
        raise BadInput(f"eps_warmup {config.eps_warmup:g} never ends within {config.epochs} epochs")
    if config.compile and config.grad_align:
        raise BadInput("grad_align needs second derivatives, which torch.compile lacks: drop one")
    if config.norm == "linf" and not 0 < config.eps <= 1:
        hint = f": did you mean {config.eps:g}/255?" if 1 < config.eps < 256 else ", such as 8/255"
        raise BadInput(
            f"eps {config.eps:g} must be above 0 and at most 1, in units of [0, 1]{hint}"
        )
    if not 0 < config.eps < math.inf:
        raise BadInput(f"eps must be positive, not {config.eps:g}")
    if config.method == "none" and (config.der or config.awp or config.on_overfit != "continue"):
        raise BadInput(
            "method 'none' makes no adversarial images: der, awp and on_overfit need some"
        )


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
    partial = f"{path}.{os.getpid()}.partial"  # each process its own: two may make the same cache
    if "model" in checkpoint:  # our weights lie channels-last, which safetensors refuses
        model = {k: v.contiguous() for k, v in checkpoint["model"].items()}
        checkpoint = {**checkpoint, "model": model}
    try:
        torch.save(checkpoint, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        kept = "; the older one is kept" * os.path.isfile(path)
        raise RunError(f"cannot save '{path}' (disk full or not writable?){kept}") from error
    finally:
        with contextlib.suppress(OSError):  # where the disk is full, give back what was taken
            os.remove(partial)


def alike(saved, like):
    """Whether `saved` has the types of `like`, all the way down; lists, those of its first one."""
    if isinstance(like, dict):
        found = isinstance(saved, dict) and like.keys() <= saved.keys()
        return found and all(alike(saved[k], like[k]) for k in like)
    if isinstance(like, (list, tuple)):
        return isinstance(saved, (list, tuple)) and all(alike(v, like[0]) for v in saved if like)
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

    weights_only=True makes torch refuse a pickle that would run something.
    Raises: RunError when the file is missing, damaged, hostile or not one of ours.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would make us wait for ever
            raise OSError(0, "not a regular file")
        with zipfile.ZipFile(path) as archive:  # torch.load itself ignores the checksums
            unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > status.st_size or archive.testzip():  # torch packs nothing
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(checkpoint, dict) and checkpoint.get("format") == "ebm-at 1"
        if ours:
            check_parts(checkpoint, status.st_size)
    except OSError as error:
        raise RunError(f"no checkpoint '{path}' ({error.strerror or error})") from error
    except Exception as error:  # torch.load raises a dozen kinds on a damaged file
        kinds = "damaged, of torch before 1.6, not a checkpoint of plain tensors, or they do not"
        raise RunError(f"'{path}' is {kinds} fit its spec: not loaded") from error
    if not ours:
        raise RunError(f"'{path}' is not a checkpoint of this project (no format 'ebm-at 1')")
    return checkpoint


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




def pick_device(name="auto"):
    """The torch.device called `name`; auto: a CUDA GPU where there is one. Raises: RunError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_initialized():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):  # "meta" computes nothing; others: untried
            raise NotImplementedError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RunError(f"device '{name}' is not there; try --device cpu") from error
    return device


def pick_precision(name, device):
    """The torch dtype that convolutions run in: bfloat16 or float32.

    bf16 keeps the exponent range of fp32, so gradients do not underflow and no loss scaling is
    needed. A CPU without bf16 instructions emulates it slowly, hence "auto".
    """
    check_choice("precision", name, ("auto", "bf16", "fp32"))
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # the probe is private, hence the guard
            probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
            fast = device.type == "cpu" and probe()
        name = "bf16" if fast else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(device, dtype):
    """A context in which convolutions and matrix products run in `dtype`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


# Several processes (torchrun) share one global batch: every process draws the SAME order, crops
# and noise from the same seed and then keeps its own rows, share(t) = t[rank::world]. So N
# processes see exactly what one would, and nothing but the order of floating-point sums differs.


def start_processes(device="auto"):
    """Joins what torchrun started; a process started by hand stays alone. Raises: RunError."""
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return
    gpu, here = torch.cuda.is_available() and device != "cpu", os.environ.get("LOCAL_WORLD_SIZE", 1)
    try:
        if gpu and (device not in ("auto", "cuda") or int(here) > torch.cuda.device_count()):
            raise ValueError("one GPU per process is needed, chosen by --device auto")
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpu else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:  # no torchrun, odd numbers, a port in use
        hint = f"start with torchrun, or unset WORLD_SIZE ({str(error)[:150]})"
        raise RunError(f"there are no other processes to join: {hint}") from error


def world():
    """(rank of this process, number of processes); (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(t):
    """This process's rows of a tensor that holds the whole global batch along dimension 0."""
    rank, processes = world()
    return t[rank::processes]


def sum_over_processes(tensors):
    """Replaces each tensor by its sum over all processes, in place, in one message."""
    if dist.is_initialized():
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))
