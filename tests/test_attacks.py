"""Attacks: purity, the ball, closed-form worst cases on linear models, gradients, refusals."""

import contextlib
import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from ebm_at import (
    BadInput, Config, apgd, apgd_t, ascend, attack_mode, cross_entropy, dlr, exact_logits, fgsm,
    fooling_and_unlikely, kl_pgd, likelier, margin, n_fgsm, nudged_pgd, pgd, pgd_to_class,
    random_noise, rs_fgsm, square, training_attack,
)  # fmt: skip

ONE_STEP = {"fgsm": fgsm, "rs_fgsm": rs_fgsm, "n_fgsm": n_fgsm}
PLAIN = ONE_STEP | {"pgd": partial(pgd, steps=3), "nudged_pgd": partial(nudged_pgd, steps=3),
                    "kl_pgd": partial(kl_pgd, steps=3)}  # fmt: skip
EVERY = PLAIN | {  # in these BatchNorm is in eval mode always
    "to_class": partial(pgd_to_class, steps=3, pick="random"), "apgd": partial(apgd, steps=9),
    "apgd_on": partial(apgd, steps=9, until_fooled=False),
    "apgd_t": partial(apgd_t, steps=4, targets=2), "square": partial(square, queries=40),
}  # fmt: skip
NORMS = ["linf", "l2"]
NORMS_OF = {name: NORMS if name != "square" else NORMS[:1] for name in EVERY}
each_norm = pytest.mark.parametrize("norm", NORMS)
each_attack = pytest.mark.parametrize("name", EVERY)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(name, model, x, y, eps, seed=0, **options):
    return EVERY[name](model, x, y, eps, generator=seeded(seed), **options)


def batch(seed=0, n=6, channels=3, size=8, classes=5, dtype=torch.float32):
    g = seeded(1000 + seed)
    x = torch.rand(n, channels, size, size, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (n,), generator=g)


def distance(x_adv, x, norm):
    """How far each image moved, measured in float64."""
    d = (x_adv.double() - x.double()).flatten(1)
    return d.abs().amax(1) if norm == "linf" else (d**2).sum(1).sqrt()


@each_attack
def test_results_lie_in_the_ball_and_in_the_unit_cube(name, tiny_net):
    """Whatever the norm, the number type and the sizes; at eps 0 nothing moves."""
    cases = itertools.product(NORMS_OF[name], (torch.float32, torch.float64), (1, 3), (2, 20))
    for seed, (norm, dtype, channels, classes) in enumerate(cases):
        n, size, eps = 1 + seed % 5, 5 + seed % 7, (1e-4, 8 / 255, 0.3, 0.7, 1.0)[seed % 5]
        x, y = batch(seed, n, channels, size, classes, dtype)
        x[0] = x[0].round()  # an image that lies in a corner of the cube
        net = tiny_net(seed, channels, classes, dtype)
        x_adv = run(name, net, x, y, eps, norm=norm)
        assert x_adv.shape == x.shape and x_adv.dtype == dtype
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        reach = 3 * eps if name == "n_fgsm" else eps
        assert (distance(x_adv, x, norm) <= reach * (1 + 1e-5) + 1e-6).all()
        assert torch.equal(run(name, net, x, y, 0.0, norm=norm), x)
        assert run(name, net, x[:0], y[:0], eps, norm=norm).shape == x[:0].shape


@each_attack
def test_nothing_but_the_seed_decides_and_every_image_has_its_own_start(name, tiny_net):
    """Not no_grad, frozen weights or the model's mode. (Square's windows are the same for all.)"""
    x, y = (t[:1].expand(4, *t.shape[1:]) for t in batch(3))  # four times the same image
    for norm in NORMS_OF[name]:
        a, c = (run(name, tiny_net(), x, y, 0.1, seed, norm=norm) for seed in (4, 5))
        with torch.no_grad():
            b = run(name, tiny_net().eval().requires_grad_(False), x, y, 0.1, 4, norm=norm)
        assert torch.equal(a, b) and torch.equal(a, c) == (name == "fgsm")
        assert len(a.unique(dim=0)) == (1 if name in ("fgsm", "square") else 4)


@each_norm
def test_random_noise_is_uniform_in_the_ball(norm):
    """In d dimensions (r / eps)^d of a uniform draw is uniform on [0, 1]: mean 1/2, var 1/12."""
    eps, d = 0.3, 3
    noise = random_noise(torch.zeros(20_000, d, 1, 1), eps, norm, seeded(0)).flatten(1).double()
    u = ((noise.norm(dim=1) if norm == "l2" else noise.abs().amax(1)) / eps) ** d
    assert u.max() <= 1 + 1e-6
    assert u.mean().item() == pytest.approx(1 / 2, abs=0.01)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.003)
    assert noise.mean(0).abs().max() < 0.01 * eps * 3  # no direction is preferred


def snapshot(net):
    """All that something could leave behind in a model."""
    about = [(m.training, getattr(m, "track_running_stats", False), len(m._forward_pre_hooks),
              len(m._forward_hooks)) for m in net.modules()]  # fmt: skip
    grads = [(p.requires_grad, p.grad) for p in net.parameters()]
    return copy.deepcopy((dict(net.state_dict()), about, grads))


@each_attack
def test_attacks_leave_no_trace_also_when_the_model_raises(name, tiny_net):
    """Model, images and the global random state are as before; the result is tied to none."""
    net, (x, _), calls, raises_at = tiny_net(1), batch(1), [], 0
    net[4].eval()  # train mode but for one BatchNorm, the way fine-tuning leaves a model
    y = exact_logits(tiny_net(1), x).argmax(1)
    net[0].bias.requires_grad_(False)
    net[0].weight.grad = torch.full_like(net[0].weight, 3.0)

    def explode(*_):
        calls.append(1)
        if len(calls) == raises_at:
            raise MemoryError

    net[8].register_forward_hook(explode)
    before = snapshot(net), x.clone(), torch.get_rng_state()
    x.requires_grad_(True)
    for norm, mode, raises_at in itertools.product(NORMS_OF[name], ("eval", "train"), (0, 1, 2)):
        options = {"batchnorm": mode} if name in PLAIN else {}
        fails = raises_at == 1 or (raises_at == 2 and name not in ONE_STEP)
        calls.clear()
        with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
            assert not run(name, net, x, y, 0.01, norm=norm, **options).requires_grad
        after = snapshot(net), x.detach(), torch.get_rng_state()
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert x.requires_grad and x.grad is None


def test_attack_mode_freezes_weights_and_can_be_nested(tiny_net):
    """torch.compile has to know; and training_loss opens one while AWP holds another open."""
    net, (x, _) = tiny_net(), batch()
    net[4].eval(), net[0].weight.requires_grad_(False)  # so its user wants it, for good
    before = snapshot(net)
    with attack_mode(net, "train"):
        with attack_mode(net, "eval"):
            assert not any(m.training for m in net.modules())
            assert not any(p.requires_grad for p in net.parameters())
        net(x)
    torch.testing.assert_close(snapshot(net), before, rtol=0, atol=0)
    net(x)  # recording goes on afterwards
    assert not torch.equal(net[1].running_mean, before[0]["1.running_mean"])


@each_norm
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_pgd_is_the_loop_of_the_textbook(norm, mode, batchnorm, tiny_net):
    """With loss.backward(). BatchNorm takes the batch's statistics if asked to, in train mode."""
    eps, step, (x, y) = 0.06, 0.015, batch(3, dtype=torch.float64)
    z = (x + random_noise(x, eps, norm, seeded(0))).clamp(0, 1)
    net = tiny_net(3, dtype=torch.float64).train(mode == batchnorm == "train")
    for _ in range(10):
        z = z.detach().requires_grad_(True)
        F.cross_entropy(net(z), y, reduction="sum").backward()
        if norm == "linf":
            z = x + (z + step * z.grad.sign() - x).clamp(-eps, eps)
        else:
            z = z + step * z.grad / (z.grad**2).sum((1, 2, 3), keepdim=True).sqrt()
            length = ((z - x) ** 2).sum((1, 2, 3), keepdim=True).sqrt()
            z = torch.where(length > eps, x + (z - x) / length * eps, z)
        z = z.clamp(0, 1)
    net = tiny_net(3, dtype=torch.float64).train(mode == "train")
    for more in ({}, dict(steps=10, step_size=step)):  # these are the defaults
        found = pgd(net, x, y, eps, norm=norm, batchnorm=batchnorm, generator=seeded(0), **more)
        torch.testing.assert_close(found, z.detach(), rtol=0, atol=1e-5)


def test_losses_to_climb_in_their_own_words():
    """Image by image. Fewer classes than a DLR has terms leave its numerator."""
    for k in (2, 3, 6):
        logits, y = torch.randn(200, k, generator=seeded(3)), torch.arange(200) % k
        target = (y + 1) % k
        for i, row in enumerate(logits.tolist()):
            z, own, one = sorted(row, reverse=True), row[y[i]], (logits[i : i + 1], y[i : i + 1])
            gap = max(v for j, v in enumerate(row) if j != y[i]) - own
            unlikely, aimed = -math.log(sum(map(math.exp, row))), row[target[i]] - own
            for loss, expected in (
                (margin, gap), (dlr, gap / (z[0] - z[2]) if k > 2 else gap), (likelier, -unlikely),
                (partial(dlr, target=target[i : i + 1]),
                 aimed / (z[0] - (z[2] + z[3]) / 2) if k > 3 else aimed),
                (fooling_and_unlikely, 1000 + unlikely if gap > 0 else gap),
            ):  # fmt: skip
                assert loss(*one).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def linear_case(seed, channels=3):
    """A linear model of two classes, and images that nothing up to .3 pushes against 0 or 1."""
    x, y = batch(seed, 9, channels, 4, 2, torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(seed), dtype=p.dtype))
    return net, 0.3 + 0.4 * x, y


def worst_case(net, x, y, eps, norm):
    """Where CE of two linear logits is largest (along w_other - w_y) and f_other - f_y there."""
    weight, f = net[1].weight.detach(), net(x).detach()
    w, rows = (weight[1 - y] - weight[y]).view_as(x), torch.arange(len(x))
    gap = f[rows, 1 - y] - f[rows, y]
    if norm == "linf":
        return x + eps * w.sign(), gap + eps * w.abs().sum((1, 2, 3))
    length = (w**2).sum((1, 2, 3)).sqrt()
    return x + eps * w / length.view(-1, 1, 1, 1), gap + eps * length


@pytest.mark.parametrize("loss", [cross_entropy, margin])
@each_norm
def test_linear_models_are_attacked_optimally(norm, loss):
    options = dict(norm=norm, loss=loss)
    for seed in range(3):
        (net, x, y), eps = linear_case(seed), 0.1
        best, gap = worst_case(net, x, y, eps, norm)
        # from a random start the l_2 iterates approach the optimum geometrically
        for x_adv in (fgsm(net, x, y, eps, **options), pgd(net, x, y, eps, start=x, **options),
                      pgd(net, x, y, eps, 100, generator=seeded(0), **options)):  # fmt: skip
            # an l_2 direction has five digits: logits become float32 on their way into the loss
            torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-6 if norm == "linf" else 1e-4)
            ce = F.cross_entropy(net(x_adv), y, reduction="none")
            torch.testing.assert_close(ce, F.softplus(gap), rtol=1e-4, atol=1e-6)


def test_rs_fgsm_and_n_fgsm_are_their_formulas():
    """On a linear model the sign of the gradient is known, so E8 and E9 can be written down."""
    (net, x, y), eps = linear_case(7), 0.05
    sign = (worst_case(net, x, y, 1.0, "linf")[0] - x).sign()
    noise = random_noise(x, eps, "linf", seeded(3))
    expected = x + (noise + 1.25 * eps * sign).clamp(-eps, eps)
    torch.testing.assert_close(run("rs_fgsm", net, x, y, eps, 3), expected)
    noise = random_noise(x, 2 * eps, "linf", seeded(3))
    torch.testing.assert_close(run("n_fgsm", net, x, y, eps, 3), x + noise + eps * sign)
    # Black images: the noise cannot make them darker, and the step starts from where it left them.
    expected = (noise.clamp(min=0) + eps * sign).clamp(0, 1)
    torch.testing.assert_close(run("n_fgsm", net, 0 * x, y, eps, 3), expected)


def test_kl_attack_leaves_x_and_reaches_one_of_the_two_far_corners():
    """KL grows with |change of the logit gap|. At x it has no gradient: hence the nudge."""
    (net, x, y), eps = linear_case(5), 0.1
    up, _ = worst_case(net, x, y, eps, "linf")
    found = kl_pgd(net, x, y, eps, 12, generator=seeded(0))
    to_up, to_down = ((found - c).abs().amax((1, 2, 3)) for c in (up, 2 * x - up))
    assert torch.minimum(to_up, to_down).max() < 1e-6
    assert (nudged_pgd(net, x, y, eps, 0) - x).std().item() == pytest.approx(0.001, rel=0.1)


def test_pgd_to_class_climbs_towards_the_class_it_should(tiny_net):
    net, (x, y) = tiny_net(2), batch(2)
    away = exact_logits(net, x).scatter(1, y[:, None], math.inf).argmin(1)
    expected = pgd(net, x, y, 0.1, start=x, loss=lambda f, _: -cross_entropy(f, away))
    assert torch.equal(pgd_to_class(net, x, y, 0.1, start=x), expected)
    net, y = tiny_net(2, classes=2), y % 2  # of two classes the other one is random and least
    least, random = (pgd_to_class(net, x, y, 0.1, start=x, pick=p) for p in ("least", "random"))
    assert torch.equal(random, least)


def test_a_gradient_of_zero_or_nan_leads_nowhere():
    """A saturated or dead model: l_2 divides by the gradient's norm."""
    x, _ = batch()
    for value, norm in itertools.product((0.0, math.nan), NORMS):
        assert torch.equal(ascend(x, torch.full_like(x, value), 0.1, norm), x)
    small = [ascend(x, torch.full_like(x, v), 0.1, "l2") - x for v in (1e-18, 1e-23, 1e-38)]
    whole, *less = (s.flatten(1).norm(dim=1).max().item() for s in small)
    assert whole == pytest.approx(0.1, rel=1e-4) and max(less) < 0.1  # a saturated model's


def test_training_attacks_are_the_public_ones(tiny_net):
    net, (x, y), eps = tiny_net(4), batch(4), 0.05
    public = {"fgsm": fgsm, "rs-fgsm": rs_fgsm, "n-fgsm": n_fgsm, "pgd": pgd, "trades": kl_pgd,
              "mart": nudged_pgd, "weat-nat": kl_pgd, "weat-adv": kl_pgd}  # fmt: skip
    for method, norm, bn in itertools.product(public, NORMS, ("eval", "train")):
        config = Config(method=method, norm=norm, attack_bn=bn, attack_steps=3, attack_step=0.1)
        found, _ = training_attack(net, x, y, eps, config, seeded(1))
        options = {} if "fgsm" in method else dict(steps=3, step_size=0.1)
        options |= dict(norm=norm, batchnorm=bn, generator=seeded(1))
        assert torch.equal(found, public[method](net, x, y, eps, **options)), method
    assert training_attack(net, x, y, eps, Config(method="none"))[0] is x


def test_bad_images_labels_and_sizes_are_refused(tiny_net):
    net, (x, y) = tiny_net(), batch()
    for bad_x, bad_y, eps, word in (
        (x * 2 - 1, y, 0.1, "normalisation"),  # the classic: (x - mean) / std handed to an attack
        (x * 255, y, 0.1, "normalisation"), (torch.where(x > 0.5, x, math.nan), y, 0.1, "nan"),
        ((x * 255).to(torch.uint8), y, 0.1, "float"), (x[0], y, 0.1, "N, C, H, W"),
        (x.half(), y, 0.1, "float32"), (x.bfloat16(), y, 0.1, "float32"),  # the ball drowns in it
        (x, y.int(), 0.1, "int64"), (x, y[:3], 0.1, "int64"), (x, F.one_hot(y), 0.1, "int64"),
        (x, y, -0.1, "eps"), (x, y, 1.1, "eps"), (x, y, math.nan, "eps"),
    ):  # fmt: skip
        for name in set(EVERY) - {"kl_pgd", "to_class"}:  # these ask the model first
            with pytest.raises(BadInput, match=word):
                run(name, net, bad_x, bad_y, eps)
