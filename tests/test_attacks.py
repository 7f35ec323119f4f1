"""Attacks: purity, the ball, closed-form worst cases on linear models, gradients, refusals."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ebm_at
from ebm_at import (
    ATTACK_LOSSES,
    BadInput,
    apgd,
    apgd_t,
    attack_loss,
    attack_mode,
    check_choice,
    energy_x,
    fgsm,
    input_gradient,
    n_fgsm,
    pgd,
    project,
    random_noise,
    rs_fgsm,
    square,
)

# name: called as (model, x, y, eps, generator, **options). fgsm draws nothing.
ATTACKS = {
    "fgsm": lambda model, x, y, eps, g=None, **o: fgsm(model, x, y, eps, **o),
    "rs_fgsm": lambda model, x, y, eps, g=None, **o: rs_fgsm(model, x, y, eps, generator=g, **o),
    "n_fgsm": lambda model, x, y, eps, g=None, **o: n_fgsm(model, x, y, eps, generator=g, **o),
    "pgd": lambda model, x, y, eps, g=None, **o: pgd(model, x, y, eps, 3, generator=g, **o),
}


def only(options, *names):
    """The options an attack knows; each lacks some, such as square a loss."""
    return {k: v for k, v in options.items() if k in names}


def run_apgd(model, x, y, eps, g=None, until_fooled=True, **o):
    o = only(o, "norm", "loss", "start")
    return apgd(model, x, y, eps, 9, generator=g, until_fooled=until_fooled, **o)


def run_apgd_t(model, x, y, eps, g=None, **o):
    return apgd_t(model, x, y, eps, 4, 2, generator=g, **only(o, "norm"))


def run_square(model, x, y, eps, g=None, **o):
    if o.get("norm") == "l2":
        pytest.skip("our Square attacks in l_inf only")
    return square(model, x, y, eps, 40, generator=g, **only(o, "norm"))


def run_apgd_on(*arguments, **o):
    return run_apgd(*arguments, until_fooled=False, **o)


SEARCHES = {"apgd": run_apgd, "apgd_on": run_apgd_on, "apgd_t": run_apgd_t, "square": run_square}
NORMS = ["linf", "l2"]
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
EVERY = ATTACKS | SEARCHES  # the searches keep BatchNorm in eval mode and choose their own target
every_attack = pytest.mark.parametrize("attack", EVERY.values(), ids=EVERY.keys())
each_search = pytest.mark.parametrize("attack", SEARCHES.values(), ids=SEARCHES.keys())
each_norm = pytest.mark.parametrize("norm", NORMS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def batch(seed=0, n=6, channels=3, size=8, classes=5, dtype=torch.float32):
    g = seeded(1000 + seed)
    x = torch.rand(n, channels, size, size, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (n,), generator=g)


def distance(x_adv, x, norm):
    """How far each image moved, measured in float64."""
    d = (x_adv.double() - x.double()).flatten(1)
    return d.abs().amax(1) if norm == "linf" else (d**2).sum(1).sqrt()


def smooth(net):
    """ReLU replaced by softplus: differentiable everywhere, as finite differences need it."""
    net[2] = net[5] = nn.Softplus()
    return net


# ----------------------------------------------------------------------------------- the ball


@each_norm
@every_attack
def test_results_lie_in_the_ball_and_in_the_unit_cube(attack, norm, tiny_net):
    for seed in range(8):
        g = seeded(seed)
        channels = (1, 3)[seed % 2]
        n, size = (int(torch.randint(1, 9, (), generator=g)) + low for low in (0, 5))
        classes = (2, 3, 5, 20)[seed % 4]
        eps = (1e-4, 8 / 255, 0.3, 0.7, 1.0)[seed % 5] * (1 if norm == "linf" else 2)
        x, y = batch(seed, n, channels, size, classes)
        x[0] = x[0].round()  # an image that lies in a corner of the cube
        options = dict(loss=ATTACK_LOSSES[seed % 6], targeted=seed % 3 == 0, norm=norm)
        x_adv = attack(tiny_net(seed, channels, classes), x, y, eps, g, **options)
        assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        reach = 3 * eps if attack is ATTACKS["n_fgsm"] else eps
        assert (distance(x_adv, x, norm) <= reach * (1 + 1e-5) + 1e-6).all()


@each_norm
def test_n_fgsm_leaves_the_ball_and_the_others_fill_it(norm, tiny_net):
    """N-FGSM's missing projection is the method; too small a step would go unseen above."""
    x, y = batch()
    x = 0.4 + 0.2 * x  # far from 0 and 1
    net, eps = tiny_net(), 0.05
    far = n_fgsm(net, x, y, eps, norm=norm, generator=seeded(0))
    assert (distance(far, x, norm) > 1.2 * eps).all()
    for attack in (fgsm, rs_fgsm):
        reached = distance(attack(net, x, y, eps, norm=norm), x, norm)
        torch.testing.assert_close(reached, torch.full_like(reached, eps), rtol=0.05, atol=0)


@each_norm
@every_attack
def test_eps_zero_returns_the_images(attack, norm, tiny_net):
    x, y = batch()
    for loss in ATTACK_LOSSES:
        assert torch.equal(attack(tiny_net(), x, y, 0.0, seeded(0), norm=norm, loss=loss), x)


@each_norm
@every_attack
def test_dtype_is_kept(attack, norm, tiny_net):
    """A float32 draw must not demote float64 images: the model could not take them."""
    x, y = batch(dtype=torch.float64)
    x_adv = attack(tiny_net(dtype=x.dtype), x, y, 0.1, seeded(0), norm=norm)
    assert x_adv.dtype == x.dtype


@each_norm
@every_attack
def test_an_empty_batch_comes_back_empty(attack, norm, tiny_net):
    x, y = batch()
    assert attack(tiny_net(), x[:0], y[:0], 0.1, seeded(0), norm=norm).shape == (0, 3, 8, 8)


@each_norm
def test_random_noise_is_uniform_in_the_ball(norm):
    """In d dimensions (r / eps)^d of a uniform draw is uniform on [0, 1]: mean 1/2, var 1/12."""
    eps, d = 0.3, 3
    noise = random_noise(torch.zeros(20_000, d, 1, 1), eps, norm, seeded(0)).flatten(1).double()
    radius = noise.norm(dim=1) if norm == "l2" else noise.abs().amax(1)
    u = (radius / eps) ** d
    assert u.max() <= 1 + 1e-6
    assert u.mean().item() == pytest.approx(1 / 2, abs=0.01)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.003)
    assert noise.mean(0).abs().max() < 0.01 * eps * 3  # no direction is preferred


@each_norm
def test_project_finds_the_nearest_point(norm):
    """By definition: inside stays put, outside lands on the border along the shortest way."""
    g = seeded(5)
    x = torch.full((50, 2, 3, 3), 0.5)
    far = x + torch.randn(x.shape, generator=g) * torch.rand(50, 1, 1, 1, generator=g) * 0.1
    found = project(far, x, 0.1, norm)
    for i in range(len(x)):
        d = (far[i] - x[i]).double()
        if norm == "linf":
            expected = d.clamp(-0.1, 0.1)
        else:
            expected = d * min(1.0, 0.1 / d.pow(2).sum().sqrt().item())
        torch.testing.assert_close((found[i] - x[i]).double(), expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------- purity


def mixed_modes(net):
    """Train mode but for one frozen BatchNorm, the way fine-tuning leaves a model."""
    net.train()
    net[4].eval()
    return net


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@each_norm
@every_attack
def test_attacks_leave_no_trace(attack, norm, batchnorm, tiny_net):
    """Modes, buffers, weights, requires_grad, .grad, images and the global RNG: all as before."""
    net = mixed_modes(tiny_net(1))
    net[0].bias.requires_grad_(False)
    kept = torch.full_like(net[0].weight, 3.0)
    net[0].weight.grad = kept
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    tracked = [getattr(m, "track_running_stats", None) for m in net.modules()]
    wanted = [p.requires_grad for p in net.parameters()]
    x, y = batch(1)
    x_before, y_before, random_state = x.clone(), y.clone(), torch.get_rng_state()
    for loss in ATTACK_LOSSES:
        attack(net, x, y, 0.1, seeded(0), norm=norm, loss=loss, batchnorm=batchnorm)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, x_before) and torch.equal(y, y_before)
    assert [m.training for m in net.modules()] == modes
    assert [getattr(m, "track_running_stats", None) for m in net.modules()] == tracked
    assert [p.requires_grad for p in net.parameters()] == wanted
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net[0].weight.grad is kept and bool((kept == 3).all())
    assert all(p.grad is None for p in list(net.parameters())[1:])
    assert x.grad is None and not x.requires_grad


@every_attack
def test_result_is_detached_also_from_images_that_want_gradients(attack, tiny_net):
    """A caller's x.requires_grad_() must not tie x* to a graph that backward then runs through."""
    x, y = batch()
    plain = attack(tiny_net(), x, y, 0.1, seeded(0))
    x.requires_grad_(True)
    x_adv = attack(tiny_net(), x, y, 0.1, seeded(0))
    assert x.requires_grad and x.grad is None
    assert torch.equal(x_adv.detach(), plain)
    assert not x_adv.requires_grad and x_adv.grad_fn is None


@every_attack
def test_works_the_same_under_no_grad_and_for_a_frozen_model(attack, tiny_net):
    x, y = batch()
    expected = attack(tiny_net(), x, y, 0.1, seeded(0))
    with torch.no_grad():
        assert torch.equal(attack(tiny_net(), x, y, 0.1, seeded(0)), expected)
        assert not torch.is_grad_enabled()
    frozen = tiny_net().requires_grad_(False)
    assert torch.equal(attack(frozen, x, y, 0.1, seeded(0)), expected)


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("call", [1, 2])
@each_attack
def test_model_is_restored_when_it_raises_inside(attack, batchnorm, call, tiny_net):
    net = mixed_modes(tiny_net())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes, calls = [m.training for m in net.modules()], []

    def explode(*_):
        calls.append(1)
        if len(calls) == call:
            raise MemoryError

    net[8].register_forward_hook(explode)
    x, y = batch()
    # kl asks the model for the clean logits first, so that even one-step attacks make two calls
    with pytest.raises(MemoryError):
        attack(net, x, y, 0.1, seeded(0), loss="kl", batchnorm=batchnorm)
    assert [m.training for m in net.modules()] == modes
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@every_attack
def test_batchnorm_eval_uses_running_statistics_whatever_the_mode(attack, tiny_net):
    x, y = batch()
    expected = attack(tiny_net().eval(), x, y, 0.1, seeded(0))
    assert torch.equal(attack(mixed_modes(tiny_net()), x, y, 0.1, seeded(0)), expected)


def test_batchnorm_train_uses_the_statistics_of_the_batch(tiny_net):
    x, y = batch()
    net = copy.deepcopy(tiny_net())
    for m in net.modules():  # without running statistics, BatchNorm always takes the batch's
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = m.running_var = None
    expected = fgsm(net, x, y, 0.1)
    found = fgsm(tiny_net(), x, y, 0.1, batchnorm="train")
    assert torch.equal(found, expected)
    assert not torch.equal(found, fgsm(tiny_net(), x, y, 0.1, batchnorm="eval"))
    # "train" leaves modes alone: in a model set to eval, running statistics stay in charge
    in_eval = fgsm(tiny_net().eval(), x, y, 0.1, batchnorm="train")
    assert torch.equal(in_eval, fgsm(tiny_net(), x, y, 0.1, batchnorm="eval"))


def test_weights_are_frozen_inside_attack_mode_and_free_again_after_a_failure(tiny_net):
    """What torch.compile has to know; and a weight that the user froze stays frozen."""
    net = tiny_net()
    net[0].weight.requires_grad_(False)
    before = [p.requires_grad for p in net.parameters()]
    with pytest.raises(RuntimeError, match="on purpose"), attack_mode(net):
        assert not any(p.requires_grad for p in net.parameters())
        raise RuntimeError("on purpose")
    assert [p.requires_grad for p in net.parameters()] == before


def test_attack_mode_can_be_nested(tiny_net):
    """training_loss opens one around GradAlign while AWP holds another open."""
    net = mixed_modes(tiny_net())
    modes, state = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    x, _ = batch()
    with attack_mode(net, "train"):
        with attack_mode(net, "train"):
            net(x)
        net(x)
        with attack_mode(net, "eval"):
            assert not any(m.training for m in net.modules())
        net(x)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    net(x)  # recording goes on afterwards, except in the frozen layer
    assert not torch.equal(net[1].running_mean, state["1.running_mean"])
    assert torch.equal(net[4].running_mean, state["4.running_mean"])


# --------------------------------------------------------------------- randomness and symmetry


@pytest.mark.parametrize("name", ["rs_fgsm", "n_fgsm", "pgd"])
@each_norm
def test_the_generator_decides_the_random_start(name, norm, tiny_net):
    x, y = batch()
    a, b, c = (ATTACKS[name](tiny_net(), x, y, 0.1, seeded(s), norm=norm) for s in (4, 4, 5))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.manual_seed(1)
    a = ATTACKS[name](tiny_net(), x, y, 0.1, None, norm=norm)
    torch.manual_seed(1)
    assert torch.equal(a, ATTACKS[name](tiny_net(), x, y, 0.1, None, norm=norm))


@each_norm
@each_attack
def test_permuting_the_batch_permutes_the_result(attack, norm, tiny_net):
    """With running statistics no image knows of its neighbours; a start is given: no draws."""
    net = tiny_net(2, dtype=torch.float64)
    x, y = batch(2, 7, dtype=torch.float64)
    start = (x + 0.02 * torch.randn(x.shape, generator=seeded(1), dtype=x.dtype)).clamp(0, 1)
    order = torch.randperm(7, generator=seeded(2))
    for loss in ATTACK_LOSSES:
        whole = attack(net, x, y, 0.05, start=start, norm=norm, loss=loss)
        permuted = attack(net, x[order], y[order], 0.05, start=start[order], norm=norm, loss=loss)
        torch.testing.assert_close(permuted, whole[order], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- what the attacks compute


@each_norm
@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_pgd_is_the_loop_of_the_textbook(norm, batchnorm, tiny_net):
    """Written out once more with loss.backward(), nothing shared with the library."""
    eps, step, steps = 0.06, 0.02, 4
    x, y = batch(3, dtype=torch.float64)
    start = (x + 0.03 * torch.randn(x.shape, generator=seeded(0), dtype=x.dtype)).clamp(0, 1)
    net = tiny_net(3, dtype=torch.float64).train(batchnorm == "train")
    z = start.clone()
    for _ in range(steps):
        z = z.detach().requires_grad_(True)
        F.cross_entropy(net(z), y, reduction="sum").backward()
        g = z.grad
        with torch.no_grad():
            if norm == "linf":
                z = z + step * g.sign()
                z = x + (z - x).clamp(-eps, eps)
            else:
                z = z + step * g / (g**2).sum((1, 2, 3), keepdim=True).sqrt()
                length = ((z - x) ** 2).sum((1, 2, 3), keepdim=True).sqrt()
                z = torch.where(length > eps, x + (z - x) / length * eps, z)
            z = z.clamp(0, 1)
    fresh = tiny_net(3, dtype=torch.float64)
    found = pgd(fresh, x, y, eps, steps, step, norm=norm, start=start, batchnorm=batchnorm)
    torch.testing.assert_close(found, z, rtol=0, atol=1e-5)


def test_default_step_and_start_of_pgd(tiny_net):
    x, y = batch()
    net = tiny_net()
    explicit = pgd(net, x, y, 0.1, 5, 0.025, start=x)
    assert torch.equal(pgd(net, x, y, 0.1, 5, random_start=False), explicit)
    start = (x + random_noise(x, 0.1, "linf", seeded(8))).clamp(0, 1)
    drawn = pgd(net, x, y, 0.1, 5, generator=seeded(8))
    assert torch.equal(drawn, pgd(net, x, y, 0.1, 5, start=start))
    # one full step from x is FGSM
    assert torch.equal(pgd(net, x, y, 0.1, 1, 0.1, random_start=False), fgsm(net, x, y, 0.1))


@pytest.mark.parametrize("loss", ATTACK_LOSSES)
@pytest.mark.parametrize("targeted", [False, True])
def test_input_gradient_against_finite_differences(loss, targeted, tiny_net):
    """Central differences in float64 of the losses written out anew."""
    net = smooth(tiny_net(4, dtype=torch.float64).eval())
    x, y = batch(4, dtype=torch.float64)
    with torch.no_grad():
        reference = net((x + 0.1).clamp(0, 1))

    def value(points):
        f = net(points)
        if loss == "ce":
            return -f.log_softmax(1).gather(1, y[:, None])[:, 0]
        if loss == "kl":
            p = reference.softmax(1)
            return (p * (p.log() - f.log_softmax(1))).sum(1)
        if loss == "energy":
            return f.exp().sum(1).log()
        own = f.gather(1, y[:, None])[:, 0]
        margin = (f - 1e9 * F.one_hot(y, f.shape[1])).amax(1) - own
        if loss == "dlr":
            ranked = f.sort(1, descending=True).values
            return margin / (ranked[:, 0] - ranked[:, 2])
        if loss == "energy-up":
            return torch.where(margin > 0, -f.exp().sum(1).log(), margin)
        return margin

    g = input_gradient(net, x, y, loss, targeted, reference)
    assert g.shape == x.shape and g.abs().amax() > 1e-3
    direction = torch.randn(x.shape, generator=seeded(6), dtype=x.dtype)
    h = 1e-5
    with torch.no_grad():
        slope = (value(x + h * direction) - value(x - h * direction)) / (2 * h)
    slope = -slope if targeted else slope
    # a relative 1e-4: logits become float32 on their way into the loss
    torch.testing.assert_close((g * direction).sum((1, 2, 3)), slope, rtol=1e-4, atol=1e-5)


def linear_model(seed, channels=3, size=4, classes=2):
    g = seeded(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net


def worst_case(net, x, y, eps, norm):
    """Where CE of two linear logits is largest (along w_other - w_y) and f_other - f_y there."""
    weight = net[1].weight.detach()
    w = (weight[1 - y] - weight[y]).view_as(x)
    logits = net(x).detach()
    gap = logits.gather(1, 1 - y[:, None])[:, 0] - logits.gather(1, y[:, None])[:, 0]
    if norm == "linf":
        return x + eps * w.sign(), gap + eps * w.abs().sum((1, 2, 3))
    length = (w**2).sum((1, 2, 3)).sqrt()
    return x + eps * w / length.view(-1, 1, 1, 1), gap + eps * length


@pytest.mark.parametrize("loss", ["ce", "margin"])
@each_norm
@pytest.mark.parametrize("seed", range(3))
def test_linear_models_are_attacked_optimally(seed, norm, loss):
    net, eps = linear_model(seed), 0.1
    x, y = batch(seed, 9, size=4, classes=2, dtype=torch.float64)
    x = 0.3 + 0.4 * x  # nothing is clipped to [0, 1]
    best, gap = worst_case(net, x, y, eps, norm)
    results = {
        "fgsm": fgsm(net, x, y, eps, norm=norm, loss=loss),
        "pgd": pgd(net, x, y, eps, 10, norm=norm, loss=loss, random_start=False),
        # from a random start the l_2 iterates approach the optimum geometrically
        "pgd, random": pgd(net, x, y, eps, 100, norm=norm, loss=loss, generator=seeded(0)),
    }
    # logits become float32 on their way into the loss: an l_2 direction is good to five digits
    for x_adv in results.values():
        torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-6 if norm == "linf" else 1e-4)
        ce = F.cross_entropy(net(x_adv), y, reduction="none")
        torch.testing.assert_close(ce, F.softplus(gap), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_clipping_to_the_cube_is_optimal_for_linf(seed):
    """The ball cut by [0, 1] is still a box, so the clipped corner is the worst case as well."""
    net = linear_model(seed)
    x, y = batch(seed, 9, size=4, classes=2, dtype=torch.float64)
    best, _ = worst_case(net, x, y, 0.3, "linf")
    for x_adv in (fgsm(net, x, y, 0.3), pgd(net, x, y, 0.3, 10, generator=seeded(1))):
        torch.testing.assert_close(x_adv, best.clamp(0, 1), rtol=0, atol=1e-7)


def test_rs_fgsm_and_n_fgsm_are_their_formulas():
    """On a linear model the sign of the gradient is known, so E10 and E11 can be written down."""
    net, eps = linear_model(7), 0.05
    x, y = batch(7, 9, size=4, classes=2, dtype=torch.float64)
    x = 0.3 + 0.4 * x
    sign = (worst_case(net, x, y, 1.0, "linf")[0] - x).sign()
    noise = random_noise(x, eps, "linf", seeded(3))
    expected = x + (noise + 1.25 * eps * sign).clamp(-eps, eps)
    torch.testing.assert_close(rs_fgsm(net, x, y, eps, generator=seeded(3)), expected)
    noise = random_noise(x, 2 * eps, "linf", seeded(3))
    expected = x + noise + eps * sign
    torch.testing.assert_close(n_fgsm(net, x, y, eps, generator=seeded(3)), expected)
    # Black images: the noise cannot make them darker, and the step starts from where it left them.
    black = torch.zeros_like(x)
    expected = (noise.clamp(min=0) + eps * sign).clamp(0, 1)
    torch.testing.assert_close(n_fgsm(net, black, y, eps, generator=seeded(3)), expected)


@each_norm
def test_energy_attack_reaches_the_lowest_energy_of_a_single_logit(norm):
    """With K = 1, E(x) = -f(x) is linear: the least energy in the ball is E(x) - eps |w|_dual."""
    net, eps = linear_model(9, classes=1), 0.1
    x, y = batch(9, size=4, classes=1, dtype=torch.float64)
    x = 0.3 + 0.4 * x
    w = net[1].weight.detach()
    lowest = energy_x(net(x)) - eps * (w.abs().sum() if norm == "linf" else (w**2).sum().sqrt())
    for x_adv in (
        fgsm(net, x, y, eps, norm=norm, loss="energy"),
        pgd(net, x, y, eps, 60, norm=norm, loss="energy", generator=seeded(0)),
    ):
        torch.testing.assert_close(energy_x(net(x_adv)), lowest.float(), rtol=0, atol=1e-4)


def test_kl_attack_reaches_one_of_the_two_far_corners():
    """KL grows with |change of the logit gap|: on a linear model it runs to an extreme corner."""
    net, eps = linear_model(5), 0.1
    x, y = batch(5, 9, size=4, classes=2, dtype=torch.float64)
    x = 0.3 + 0.4 * x
    up, _ = worst_case(net, x, y, eps, "linf")
    found = pgd(net, x, y, eps, 12, loss="kl", generator=seeded(0))
    to_up, to_down = ((found - c).abs().amax((1, 2, 3)) for c in (up, 2 * x - up))
    assert torch.minimum(to_up, to_down).max() < 1e-6


@pytest.mark.parametrize("seed", range(3))
@each_norm
def test_each_loss_climbs_and_targeted_descends(seed, norm, tiny_net):
    """A small ball in float64, so that each image must improve, not only their mean."""
    net = smooth(tiny_net(seed, dtype=torch.float64).eval())
    x, y = batch(seed, dtype=torch.float64)
    eps = 2 / 255 if norm == "linf" else 0.1

    def ce(z, labels):
        return F.cross_entropy(net(z), labels, reduction="none")

    target = (y + 1) % 5
    for steps in (1, 5):
        options = dict(steps=steps, norm=norm, random_start=False)
        assert (ce(pgd(net, x, y, eps, **options), y) > ce(x, y)).all()
        reached = pgd(net, x, target, eps, targeted=True, **options)
        assert (ce(reached, target) < ce(x, target)).all()
        lower = pgd(net, x, y, eps, loss="energy", **options)
        assert (net(lower).logsumexp(1) > net(x).logsumexp(1)).all()
        wider = pgd(net, x, y, eps, loss="margin", **options)
        before, after = (attack_loss(net(z), y, "margin") for z in (x, wider))
        assert (after > before).all()
    for attack in (rs_fgsm, n_fgsm):
        x_adv = attack(net, x, y, eps, norm=norm, generator=seeded(seed))
        assert ce(x_adv, y).mean() > ce(x, y).mean()


@pytest.mark.parametrize("seed", range(3))
def test_more_steps_climb_higher(seed, tiny_net):
    net = tiny_net(seed).eval()
    x, y = batch(seed, 32)
    losses = [
        F.cross_entropy(net(pgd(net, x, y, 0.05, steps, 0.01, random_start=False)), y).item()
        for steps in (0, 1, 3, 10)
    ]
    assert losses == sorted(losses) and losses[0] < losses[-1]


@pytest.mark.parametrize("seed", range(4))
def test_margin_is_positive_exactly_when_misclassified(seed):
    g = seeded(seed)
    logits = torch.randn(200, 2 + 3 * seed, generator=g)
    y = torch.randint(logits.shape[1], (200,), generator=g)
    margin = attack_loss(logits, y, "margin")
    assert torch.equal(margin > 0, logits.argmax(1) != y)
    for i in range(0, 200, 20):
        others = [v for k, v in enumerate(logits[i].tolist()) if k != y[i]]
        assert margin[i].item() == pytest.approx(max(others) - logits[i, y[i]].item(), abs=1e-6)


def test_dlr_in_its_own_words():
    """Equations 6 and 7 of Croce & Hein, image by image, and what remains of them for few classes.

    Scaling all logits changes nothing, that is what DLR was made for.
    """
    g = seeded(3)
    logits, y = torch.randn(40, 6, generator=g), torch.randint(6, (40,), generator=g)
    target = (y + 1 + torch.randint(5, (40,), generator=g)) % 6
    plain, aimed = attack_loss(logits, y, "dlr"), attack_loss(logits, y, "dlr", None, target)
    for i, row in enumerate(logits.tolist()):
        z, own = sorted(row, reverse=True), row[y[i]]
        rival = z[0] if z[0] != own else z[1]
        assert plain[i].item() == pytest.approx((rival - own) / (z[0] - z[2]), rel=1e-4)
        expected = (row[target[i]] - own) / (z[0] - (z[2] + z[3]) / 2)
        assert aimed[i].item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(attack_loss(100 * logits, y, "dlr"), plain)
    for k in (2, 3):
        few, y, t = logits[:, :k], torch.zeros_like(y), torch.ones_like(y)
        margin = attack_loss(few, y, "margin")
        found = attack_loss(few, y, "dlr")
        assert torch.equal(found, margin) == (k == 2)
        assert torch.equal(attack_loss(few, y, "dlr", None, t), few[:, 1] - few[:, 0])


def test_attack_losses_in_their_own_words():
    g = seeded(2)
    logits, reference = torch.randn(10, 4, generator=g), torch.randn(10, 4, generator=g)
    y = torch.randint(4, (10,), generator=g)
    ce = -logits.softmax(1).log()[torch.arange(10), y]
    torch.testing.assert_close(attack_loss(logits, y), ce)
    torch.testing.assert_close(attack_loss(logits, y, "energy"), logits.exp().sum(1).log())
    p, q = reference.softmax(1), logits.softmax(1)
    kl = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(attack_loss(logits, y, "kl", reference), kl, rtol=1e-4, atol=1e-6)


@each_norm
def test_a_flat_model_gives_no_nan(norm):
    """Zero gradient everywhere (a saturated or dead model): l_2 divides by the gradient's norm."""
    net = linear_model(0)
    nn.init.zeros_(net[1].weight)
    x, y = batch(size=4, classes=2, dtype=torch.float64)
    assert torch.equal(fgsm(net, x, y, 0.1, norm=norm), x)
    assert torch.equal(pgd(net, x, y, 0.1, 3, norm=norm, random_start=False), x)


# ---------------------------------------------------------------------------- training attacks


@pytest.mark.parametrize("bn", ["eval", "train"])
@each_norm
def test_training_attacks_are_the_public_ones(norm, bn, tiny_net):
    x, y = batch(4)
    net, eps = tiny_net(4), 0.05
    options = dict(norm=norm, batchnorm=bn)
    for method, attack in (
        ("none", lambda s: x),
        ("fgsm", lambda s: fgsm(net, x, y, eps, **options)),
        ("rs-fgsm", lambda s: rs_fgsm(net, x, y, eps, generator=seeded(1), **options)),
        ("n-fgsm", lambda s: n_fgsm(net, x, y, eps, generator=seeded(1), **options)),
        ("pgd", lambda s: pgd(net, x, y, eps, 3, generator=seeded(1), **options)),
        ("trades", lambda s: pgd(net, x, y, eps, 3, loss="kl", start=s, **options)),
        ("mart", lambda s: pgd(net, x, y, eps, 3, loss="ce", start=s, **options)),
        ("weat-nat", lambda s: pgd(net, x, y, eps, 3, loss="kl", start=s, **options)),
    ):
        config = ebm_at.Config(method=method, norm=norm, attack_steps=3, attack_bn=bn)
        start = ebm_at.attack_start(x, method, eps, norm, seeded(1))
        found = ebm_at.training_attack(net, x, y, start, eps, config)
        assert torch.equal(found, attack(start)), method
        if method in ("trades", "mart", "weat-nat"):
            assert (start - x).std().item() == pytest.approx(0.001, rel=0.1)


# ------------------------------------------------------------------------------------ refusals


@every_attack
def test_bad_images_and_labels_are_refused(attack, tiny_net):
    x, y = batch()
    net = tiny_net()
    for bad_x, word in (
        (x * 2 - 1, "normalisation"),  # the classic: (x - mean) / std handed to an attack
        (x * 255, "normalisation"),
        (torch.where(x > 0.5, x, math.nan), "nan"),
        ((x * 255).to(torch.uint8), "float"),
        (x.half(), "float32"),  # too coarse to tell whether a point lies in the ball
        (x.bfloat16(), "float32"),
        (x.long(), "float"),
        (x[0], "N, C, H, W"),
    ):
        with pytest.raises(BadInput, match=word):
            attack(net, bad_x, y, 0.1)
    for bad_y in (y.int(), y.float(), y[:3], y[:, None], F.one_hot(y)):
        with pytest.raises(BadInput, match="int64"):
            attack(net, x, bad_y, 0.1)
    assert net.training  # refusing leaves no trace either


@each_attack
def test_bad_settings_are_refused_with_the_nearest_name(attack, tiny_net):
    x, y = batch()
    net = tiny_net()
    for eps in (-0.1, math.nan, math.inf):
        with pytest.raises(BadInput, match="eps"):
            attack(net, x, y, eps)
    for options, nearest in (
        (dict(norm="linff"), "'linf'"),
        (dict(norm="l_2"), "'l2'"),
        (dict(loss="margn"), "'margin'"),
        (dict(loss="CE"), "ce"),
        (dict(batchnorm="evla"), "'eval'"),
    ):
        with pytest.raises(BadInput, match=nearest):
            attack(net, x, y, 0.1, **options)
    assert net.training and all(m.training for m in net.modules())


def test_check_choice_names_the_nearest_or_lists_all():
    check_choice("fruit", "apple", ("apple", "pear"))
    with pytest.raises(BadInput, match="unknown fruit 'aple': did you mean 'apple'"):
        check_choice("fruit", "aple", ("apple", "pear"))
    with pytest.raises(BadInput, match="choose from apple, pear"):
        check_choice("fruit", "zzz", ("apple", "pear"))
    assert issubclass(BadInput, ValueError)
