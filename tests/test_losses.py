"""The training losses, each against its formula written out per image in float64 NumPy."""

import contextlib
import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_attacks import batch, snapshot

from ebm_at import (
    abnormal, adversarial_loss, adversarial_weights, cross_entropy, delta_energy,
    delta_energy_norm, der, grad_align, mart_loss, trades_loss, weat_loss,
)  # fmt: skip

LOSSES = adversarial_loss, trades_loss, mart_loss, weat_loss, partial(weat_loss, natural=False)


def draw(seed):
    """Random logits (N, K), those of the twins, and labels."""
    g = torch.Generator().manual_seed(100 + seed)
    n, k = 3 + 2 * seed, 3 + seed
    logits = torch.randn(n, k, generator=g) * 2
    return logits, logits + torch.randn(n, k, generator=g), torch.randint(k, (n,), generator=g)


def rows(logits, twin, y):
    """(f(x), f(x*), y, p(.|x), p(.|x*), KL(p(.|x) || p(.|x*))) of one image after the other."""
    for f, f_adv, label in zip(logits.double().numpy(), twin.double().numpy(), y.tolist()):
        p, q = (np.exp(v) / np.exp(v).sum() for v in (f, f_adv))
        yield f, f_adv, label, p, q, sum(a * np.log(a / b) for a, b in zip(p, q))


def der_in_numpy(logits, twin, y, gamma, abnormal_only):
    """Equation (7), image by image, with the loss itself to tell what is abnormal."""
    terms = []
    for f, f_adv, label, p, q, _ in rows(logits, twin, y):
        marginal = -np.log(np.exp(f).sum()) + np.log(np.exp(f_adv).sum())
        excess = max(0.0, np.hypot(marginal, f_adv[label] - f[label]) - gamma)
        if not abnormal_only or -np.log(q[label]) < -np.log(p[label]):
            terms.append(excess)
    return np.mean(terms) if terms else 0.0


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("only", [False, True])
def test_der_is_equation_7_and_so_is_its_gradient(only, gamma):
    """Against finite differences of the NumPy formula, in every logit of x and of x*."""
    for logits, twin, y in map(draw, range(4)):
        expected = der_in_numpy(logits, twin, y, gamma, only)
        assert der(logits, twin, y, gamma, only).item() == pytest.approx(expected, rel=1e-4)
    pair = [logits.double().requires_grad_(), twin.double().requires_grad_()]
    slopes = torch.autograd.grad(der(*pair, y, gamma, only), pair)
    for which, i in itertools.product((0, 1), np.ndindex(*logits.shape)):
        moved, values = [t.detach().clone() for t in pair], []
        for h in (1e-5, -2e-5):
            moved[which][i] += h
            values.append(der_in_numpy(*moved, y, gamma, only))
        assert slopes[which][i].item() == pytest.approx((values[0] - values[1]) / 2e-5, abs=2e-4)


def test_der_has_no_gradient_where_nothing_moves():
    """The root of 0 has an infinite slope; what reaches the weights must be 0, not NaN."""
    f, _, y = draw(1)
    pair = f.clone().requires_grad_(), f.clone().requires_grad_()
    for value in (der(*pair, y), der(*pair, y, abnormal_only=True)):
        assert value.item() == 0
        assert all((slope == 0).all() for slope in torch.autograd.grad(value, pair))


def test_cross_entropy_cannot_move_without_der_seeing_it():
    """|CE(x*) - CE(x)| <= sqrt(2) dE(x, x*, y), reached when dE(x) = -dE(x, y)."""
    g = torch.Generator().manual_seed(0)
    logits, twin = torch.randn(2, 5000, 6, generator=g).mul(4).double()
    y = torch.randint(6, (5000,), generator=g)
    moved = cross_entropy(twin, y) - cross_entropy(logits, y)
    share = (moved.abs() / delta_energy_norm(logits, twin, y)).max().item()
    assert 1.4 < share <= math.sqrt(2) + 1e-5  # the constant is not too generous


def test_a_shift_of_all_logits_can_hide_one_energy_but_not_both():
    """Why DER needs both: a shift hides dE(x) alone, at the price of dE(x, y)."""
    logits, twin, y = draw(3)
    delta = delta_energy(logits, twin)
    shifted = twin - delta[:, None]  # E(x*) becomes E(x): |dE(x)| is blind ...
    assert delta_energy(logits, shifted).abs().max() < 1e-5 < delta.abs().min()
    torch.testing.assert_close(cross_entropy(shifted, y), cross_entropy(twin, y))
    hidden = cross_entropy(shifted, y) - cross_entropy(logits, y)
    torch.testing.assert_close(delta_energy_norm(logits, shifted, y), hidden.abs())  # ... DER not


def test_the_losses_are_their_formulas():
    """WEAT weighs by E(x) of the CLEAN image in both. Abnormal: the loss was lowered."""
    for seed, beta in itertools.product(range(4), (0.0, 1.0, 6.0)):
        terms, lowered, drawn = [], [], draw(seed)
        for f, _, label, p, q, kl in rows(*drawn):
            clean, adversarial = -np.log(p[label]), -np.log(q[label])
            lowered.append(adversarial < clean)
            w = 1 / np.log(1 + np.exp(abs(np.log(np.exp(f).sum()))))
            boosted = adversarial - np.log(1 + 1e-4 - np.delete(q, label).max())
            terms.append([adversarial, clean + beta * kl, boosted + beta * kl * (1 - p[label]),
                          w * (clean + beta * kl), w * (adversarial + beta * kl)])  # fmt: skip
        found = [loss(*drawn, beta).item() for loss in LOSSES]
        assert found == pytest.approx(np.mean(terms, 0), rel=1e-4)
        assert abnormal(*drawn).tolist() == lowered
        half = [t.bfloat16() if t.is_floating_point() else t for t in drawn]
        assert all(loss(*half, beta).dtype == torch.float32 for loss in LOSSES)


def test_losses_stay_finite_at_the_extremes():
    """MART where the model is sure and wrong (log 0), WEAT where |E(x)| is huge (exp |E|)."""
    twin, y = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True), torch.tensor([1])
    loss = mart_loss(torch.zeros(1, 3), twin, y)
    (slope,) = torch.autograd.grad(loss, twin)
    assert loss.isfinite() and slope.isfinite().all()
    loss = weat_loss(torch.full((1, 3), 1e4), torch.zeros(1, 3), y, 0.0)
    assert loss.item() == pytest.approx(1e-4 * math.log(3), rel=1e-3)


def test_weat_weights_carry_no_gradient():
    """Else the model could lower the loss by moving E(x) away from 0 instead of fitting."""
    f, twin, y = draw(2)
    w = 1 / (1 + f.logsumexp(1, keepdim=True).abs().exp()).log()
    expected = w * (f.softmax(1) - F.one_hot(y, f.shape[1])) / len(y)
    (found,) = torch.autograd.grad(weat_loss(f.requires_grad_(), twin, y, 0.0), f)
    torch.testing.assert_close(found, expected)


def test_grad_align_turns_the_noisy_gradient_towards_a_fixed_clean_one(tiny_net):
    """Value and slope. Smooth activations, because ReLU has no second derivative to follow."""
    net, (x, y), (noise, _) = tiny_net(1).double().eval(), batch(1), batch(2)
    net[2] = net[5] = nn.Softplus()

    def slope(point, k):
        return torch.func.grad(lambda z: -net(z[None]).log_softmax(1)[0, k])(point).flatten()

    x, noise, cosines = x.double(), 0.1 * noise.double(), []
    for point, shift, k in zip(x, noise, y):
        a, b = slope(point, k).detach(), slope(point + shift, k)
        cosines.append(a @ b / (a.norm() * b.norm()))
    expected, found = 1 - torch.stack(cosines).mean(), grad_align(net, x, y, noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found, expected = (torch.autograd.grad(value, net[0].weight) for value in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def awp(tiny_net):
    """A network with a frozen matrix, and its loss as a function."""
    net, (x, y) = tiny_net(3), batch(3)
    net[3].weight.requires_grad_(False)
    return net, lambda other=net: F.cross_entropy(other(x), y)


def test_awp_moves_each_matrix_by_gamma_times_its_norm_uphill(awp):
    """And gradients taken meanwhile are those at the shifted weights."""
    net, objective = awp
    net.spare = nn.Linear(3, 3)  # nobody asks for its weights
    net.spare.forward = lambda z: z
    twin, before = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    objective(twin).backward()  # its own backward pass gives the directions
    with adversarial_weights(net, objective, 0.05):
        for (name, w), other in zip(net.named_parameters(), twin.parameters()):
            moves = w.ndim > 1 and other.grad is not None  # not: biases, BatchNorm, what is frozen
            step = before[name].norm() * other.grad / other.grad.norm() if moves else 0
            torch.testing.assert_close(w.detach(), before[name] + 0.05 * step, rtol=1e-4, atol=1e-6)
        twin.load_state_dict(net.state_dict())
        objective().backward()
    twin.zero_grad()
    objective(twin).backward()
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("where", ["nowhere", "inside", "in the objective"])
def test_awp_leaves_no_trace_also_when_something_raises(where, awp):
    """Weights and BatchNorm buffers bit for bit, `.grad` untouched, modes as they were."""
    net, objective = awp
    net[4].eval()
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    before, weight = snapshot(net), net[0].weight.detach().clone()

    def stop(place):
        if where == place:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        with adversarial_weights(net, lambda: (objective(), stop("in the objective"))[0], 0.05):
            assert not torch.equal(net[0].weight, weight)
            stop("inside")
    torch.testing.assert_close(snapshot(net), before, rtol=0, atol=0)
