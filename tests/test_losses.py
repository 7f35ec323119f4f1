"""The training losses, each against its formula written out per image in float64 NumPy."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from ebm_at import (
    abnormal,
    adversarial_loss,
    adversarial_weights,
    delta_energy,
    delta_energy_norm,
    der,
    grad_align,
    mart_loss,
    trades_loss,
    weat_adv_loss,
    weat_nat_loss,
    weat_weights,
)

SEEDS = range(4)


def draw(seed):
    """Random logits (N, K), those of the twins, and labels."""
    g = torch.Generator().manual_seed(100 + seed)
    n, k = 3 + 2 * seed, 3 + seed
    logits = torch.randn(n, k, generator=g) * 2
    return logits, logits + torch.randn(n, k, generator=g), torch.randint(k, (n,), generator=g)


def softmax(row):
    e = np.exp(row - row.max())
    return e / e.sum()


def rows(logits, twin, y):
    """(f(x), f(x*), y, p(.|x), p(.|x*), KL(p(.|x) || p(.|x*))) of one image after the other."""
    for f, f_adv, label in zip(logits.double().numpy(), twin.double().numpy(), y.tolist()):
        p, q = softmax(f), softmax(f_adv)
        yield f, f_adv, label, p, q, sum(a * np.log(a / b) for a, b in zip(p, q))


def four_energies(f, f_adv, label):
    """(dE(x), dE(x, y)) of one image, in float64 NumPy."""
    return -np.log(np.exp(f).sum()) + np.log(np.exp(f_adv).sum()), f_adv[label] - f[label]


def der_in_numpy(logits, twin, y, gamma=0.0, abnormal_only=False):
    """Equation (7), image by image, with the loss itself (not energies) to tell what is abnormal."""
    terms = []
    for f, f_adv, label, p, q, _ in rows(logits, twin, y):
        excess = max(0.0, np.hypot(*four_energies(f, f_adv, label)) - gamma)
        if not abnormal_only or -np.log(q[label]) < -np.log(p[label]):
            terms.append(excess)
    return np.mean(terms) if terms else 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_der_is_equation_7(seed):
    logits, twin, y = draw(seed)
    for gamma in (0.0, 0.7):
        for only in (False, True):
            expected = der_in_numpy(logits, twin, y, gamma, only)
            assert der(logits, twin, y, gamma, only).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("only", [False, True])
def test_the_gradient_of_der_is_that_of_equation_7(only):
    """Against finite differences of the NumPy formula, in every logit of x and of x*."""
    logits, twin, y = (t.double() if t.is_floating_point() else t for t in draw(2))
    slopes = torch.autograd.grad(
        der(a := logits.clone().requires_grad_(), b := twin.clone().requires_grad_(), y, 0.3, only),
        (a, b),
    )
    for which, slope in enumerate(slopes):
        for i in np.ndindex(*logits.shape):
            values = []
            for h in (1e-5, -1e-5):
                pair = [logits.clone(), twin.clone()]
                pair[which][i] += h
                values.append(der_in_numpy(*pair, y, 0.3, only))
            assert slope[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, abs=2e-4)


@pytest.mark.parametrize("only", [False, True])
def test_der_has_no_gradient_where_nothing_moves(only):
    """The root of 0 has an infinite slope; what reaches the weights must be 0, not NaN."""
    logits, _, y = draw(1)
    twin = logits.clone().requires_grad_()
    value = der(logits.requires_grad_(), twin, y, abnormal_only=only)
    assert value.item() == 0
    for slope in torch.autograd.grad(value, (logits, twin)):
        assert (slope == 0).all()


def test_cross_entropy_cannot_move_without_der_seeing_it():
    """|CE(x*) - CE(x)| <= sqrt(2) dE(x, x*, y), reached when dE(x) = -dE(x, y)."""
    g = torch.Generator().manual_seed(0)
    logits, twin = torch.randn(2, 5000, 6, generator=g).mul(4).double()
    y = torch.randint(6, (5000,), generator=g)
    moved = F.cross_entropy(twin, y, reduction="none") - F.cross_entropy(logits, y, reduction="none")
    share = moved.abs() / delta_energy_norm(logits, twin, y)
    assert share.max().item() <= math.sqrt(2) + 1e-5
    assert share.max().item() > 1.4  # the constant is not too generous


@pytest.mark.parametrize("seed", SEEDS)
def test_abnormal_means_that_the_attack_lowered_the_loss(seed):
    logits, twin, y = draw(seed)
    expected = [-np.log(q[label]) < -np.log(p[label]) for _, _, label, p, q, _ in rows(logits, twin, y)]
    assert abnormal(logits, twin, y).tolist() == expected


def test_a_shift_of_all_logits_moves_the_energy_but_not_the_prediction():
    """Why DER needs both energies: a shift can hide dE(x) alone, at the price of dE(x, y)."""
    logits, twin, y = draw(3)
    delta = delta_energy(logits, twin)
    shifted = twin - delta[:, None]  # E(x*) becomes E(x): |dE(x)| is blind ...
    assert delta_energy(logits, shifted).abs().max() < 1e-5 < delta.abs().min()
    torch.testing.assert_close(F.cross_entropy(shifted, y), F.cross_entropy(twin, y))
    hidden = F.cross_entropy(shifted, y, reduction="none") - F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(delta_energy_norm(logits, shifted, y), hidden.abs())  # ... DER is not


@pytest.mark.parametrize("seed", SEEDS)
def test_adversarial_loss_looks_at_the_twins_alone(seed):
    logits, twin, y = draw(seed)
    expected = np.mean([-np.log(q[label]) for _, _, label, _, q, _ in rows(logits, twin, y)])
    assert adversarial_loss(None, twin, y, None).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_trades(seed, beta):
    logits, twin, y = draw(seed)
    terms = [-np.log(p[label]) + beta * kl for _, _, label, p, _, kl in rows(logits, twin, y)]
    assert trades_loss(logits, twin, y, beta).item() == pytest.approx(np.mean(terms), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 5.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_mart(seed, beta):
    logits, twin, y = draw(seed)
    terms = []
    for _, _, label, p, q, kl in rows(logits, twin, y):
        boosted = -np.log(q[label]) - np.log(1 + 1e-4 - np.delete(q, label).max())
        terms.append(boosted + beta * kl * (1 - p[label]))
    assert mart_loss(logits, twin, y, beta).item() == pytest.approx(np.mean(terms), rel=1e-4)


def test_mart_stays_finite_when_the_model_is_sure_and_wrong():
    """log(1 - p) of a rival with p = 1 is -inf without the small constant, its gradient nan."""
    twin = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = mart_loss(torch.zeros(1, 3), twin, torch.tensor([1]))
    loss.backward()
    assert loss.isfinite() and twin.grad.isfinite().all()


@pytest.mark.parametrize("seed", SEEDS)
def test_weat_weights(seed):
    logits, _, _ = draw(seed)
    energy = [-np.log(np.exp(f).sum()) for f in logits.double().numpy()]
    expected = [1 / np.log(1 + np.exp(abs(e))) for e in energy]
    np.testing.assert_allclose(weat_weights(logits).numpy(), expected, rtol=1e-5)
    assert not weat_weights(logits.requires_grad_(True)).requires_grad
    # Largest at E(x) = 0, where it is 1 / log 2, and still positive for a huge |E|.
    at_zero = weat_weights(torch.full((1, 4), -np.log(4.0))).item()
    assert at_zero == pytest.approx(1 / np.log(2), rel=1e-5)
    assert weat_weights(torch.full((1, 4), 1e4)).item() == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("beta", [0.0, 6.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_weat_nat_and_adv(seed, beta):
    """The weight comes from E(x) of the CLEAN image in both; only the cross-entropy differs."""
    logits, twin, y = draw(seed)
    nat, adv = [], []
    for f, _, label, p, q, kl in rows(logits, twin, y):
        w = 1 / np.log(1 + np.exp(abs(np.log(np.exp(f).sum()))))
        nat.append(w * (-np.log(p[label]) + beta * kl))
        adv.append(w * (-np.log(q[label]) + beta * kl))
    assert weat_nat_loss(logits, twin, y, beta).item() == pytest.approx(np.mean(nat), rel=1e-4)
    assert weat_adv_loss(logits, twin, y, beta).item() == pytest.approx(np.mean(adv), rel=1e-4)


def test_weat_weights_carry_no_gradient():
    """Else the model could lower the loss by moving E(x) away from 0 instead of fitting."""
    logits, twin, y = draw(2)
    logits.requires_grad_(True)
    (found,) = torch.autograd.grad(weat_nat_loss(logits, twin, y, 0.0), logits)
    p = logits.detach().softmax(1)
    w = weat_weights(logits)[:, None]
    expected = w * (p - F.one_hot(y, p.shape[1])) / len(y)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "loss", [adversarial_loss, trades_loss, mart_loss, weat_nat_loss, weat_adv_loss]
)
def test_losses_are_float32_and_agree_with_finite_differences(loss):
    """The gradient with respect to f(x*); for WEAT too, since its weights depend on f(x) alone."""
    logits, twin, y = draw(1)
    assert loss(logits.bfloat16(), twin.bfloat16(), y, 2.0).dtype == torch.float32
    twin.requires_grad_(True)
    (g,) = torch.autograd.grad(loss(logits, twin, y, 2.0), twin)
    h = 1e-2
    for i, k in ((0, 0), (1, 2), (4, 3)):
        shift = torch.zeros_like(twin)
        shift[i, k] = h
        with torch.no_grad():
            above, below = (loss(logits, z, y, 2.0) for z in (twin + shift, twin - shift))
            slope = (above - below) / (2 * h)
        assert slope.item() == pytest.approx(g[i, k].item(), rel=2e-2, abs=2e-4)


# ---------------------------------------------------------------------------------- GradAlign


def batch(seed, n=6, classes=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 8, 8, generator=g, dtype=dtype)
    noise = (torch.rand(n, 3, 8, 8, generator=g, dtype=dtype) * 2 - 1) * 0.1
    return x, torch.randint(classes, (n,), generator=g), noise


@pytest.mark.parametrize("seed", SEEDS)
def test_grad_align_against_one_image_at_a_time(seed, tiny_net):
    net = tiny_net(seed, dtype=torch.float64).eval()
    x, y, noise = batch(seed)
    cosines = []
    for i in range(len(x)):
        a, b = (p[i : i + 1].clone().requires_grad_(True) for p in (x, x + noise))
        for point in (a, b):
            (-net(point).log_softmax(1)[0, y[i]]).backward()
        ga, gb = a.grad.flatten().numpy(), b.grad.flatten().numpy()
        cosines.append(ga @ gb / np.sqrt((ga @ ga) * (gb @ gb)))
    assert grad_align(net, x, y, noise).item() == pytest.approx(1 - np.mean(cosines), abs=1e-5)
    assert grad_align(net, x, y, torch.zeros_like(x)).item() == pytest.approx(0, abs=1e-6)


def test_grad_align_is_zero_for_a_linear_model():
    """With two classes the gradient of a linear model points the same way everywhere."""
    x, y, noise = batch(0, classes=2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double()
    assert grad_align(net, x, y, noise).item() == pytest.approx(0, abs=1e-9)


def test_grad_align_turns_the_noisy_gradient_towards_a_fixed_clean_one(tiny_net):
    """A small step down its slope lowers 1 - cos, the gradient at x held as it was.

    Smooth activations, because those of ReLU have no second derivative to follow.
    """
    net = tiny_net(1, dtype=torch.float64).eval()
    net[2] = net[5] = nn.Softplus()
    x, y, noise = batch(1)

    def slope(point):
        point = point.clone().requires_grad_(True)
        loss = F.cross_entropy(net(point), y, reduction="sum")
        return torch.autograd.grad(loss, point)[0].flatten(1)

    clean, before = slope(x), grad_align(net, x, y, noise)
    weights = [p for p in net.parameters() if p.ndim > 1]
    gradients = torch.autograd.grad(before, weights)
    step = 1e-3 * before.item() / sum((g**2).sum() for g in gradients)
    with torch.no_grad():
        for w, g in zip(weights, gradients):
            w -= step * g
    # To first order the value falls by step * |g|^2, one thousandth of itself.
    after = 1 - F.cosine_similarity(clean, slope(x + noise)).mean()
    assert (before - after).item() == pytest.approx(1e-3 * before.item(), rel=0.05)


# ------------------------------------------------------------------------------------- AWP


def awp_case(tiny_net, seed=3):
    net = tiny_net(seed)
    x, y, _ = batch(seed, dtype=torch.float32)
    return net, lambda: F.cross_entropy(net(x), y)


def state(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(net, before):
    return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("gamma", [0.005, 0.1])
def test_awp_moves_each_matrix_by_gamma_times_its_norm_uphill(gamma, tiny_net):
    net, objective = awp_case(tiny_net)
    twin = copy.deepcopy(net)  # its own backward pass gives the directions
    x, y, _ = batch(3, dtype=torch.float32)
    F.cross_entropy(twin(x), y).backward()
    before = state(net)
    with adversarial_weights(net, objective, gamma):
        for (name, w), (_, other) in zip(net.named_parameters(), twin.named_parameters()):
            if w.ndim == 1:  # biases and BatchNorm stay where they are
                assert torch.equal(w, before[name])
                continue
            old = before[name]
            expected = old + gamma * old.norm() * other.grad / other.grad.norm()
            torch.testing.assert_close(w.detach(), expected, rtol=1e-4, atol=1e-6)
            moved = (w.detach() - old).norm() / old.norm()
            assert moved.item() == pytest.approx(gamma, rel=1e-3)
    assert same(net, before)


def test_awp_leaves_frozen_and_unused_weights_alone(tiny_net):
    net, objective = awp_case(tiny_net)
    net[0].weight.requires_grad_(False)
    net.spare = torch.nn.Linear(3, 3)
    net.spare.forward = lambda z: z  # it is there, and nobody asks for its weights
    before = state(net)
    with adversarial_weights(net, objective, 0.05):
        moved = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert moved == ["3.weight", "8.weight"] and same(net, before)


def test_awp_raises_the_loss_while_open(tiny_net):
    net, objective = awp_case(tiny_net)
    net.eval()
    plain = objective().item()
    with adversarial_weights(net, objective, 0.02):
        assert objective().item() > plain
    assert objective().item() == plain


def test_awp_leaves_no_trace(tiny_net):
    """Weights and BatchNorm buffers bit for bit, `.grad` untouched, modes as they were."""
    net, objective = awp_case(tiny_net)
    net[4].eval()
    before, modes = state(net), [m.training for m in net.modules()]
    kept = torch.full_like(net[0].weight, 7.0)
    net[0].weight.grad = kept
    with adversarial_weights(net, objective, 0.05):
        pass
    assert same(net, before)
    assert [m.training for m in net.modules()] == modes
    assert net[0].weight.grad is kept and bool((kept == 7).all())
    assert net[3].weight.grad is None


def test_awp_gradients_are_those_at_the_shifted_weights(tiny_net):
    net, objective = awp_case(tiny_net)
    shifted = copy.deepcopy(net)
    with adversarial_weights(net, objective, 0.05):
        shifted.load_state_dict(net.state_dict())
        objective().backward()
    x, y, _ = batch(3, dtype=torch.float32)
    F.cross_entropy(shifted(x), y).backward()
    for p, q in zip(net.parameters(), shifted.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_awp_restores_after_an_exception_inside(tiny_net):
    """A diverged loss or Ctrl-C inside the block must not leave shifted weights behind."""
    net, objective = awp_case(tiny_net)
    before = state(net)
    with pytest.raises(KeyboardInterrupt):
        with adversarial_weights(net, objective, 0.05):
            raise KeyboardInterrupt
    assert same(net, before)


def test_awp_objective_that_raises_changes_nothing(tiny_net):
    net, _ = awp_case(tiny_net)
    before, modes = state(net), [m.training for m in net.modules()]

    def broken():
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        with adversarial_weights(net, broken, 0.05):
            pass
    assert same(net, before)
    assert [m.training for m in net.modules()] == modes
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))
