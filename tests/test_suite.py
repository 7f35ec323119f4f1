"""APGD, Square and robust_accuracy: optima, schedules, independence of batches, honest claims."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_attacks import batch, distance, each_norm, linear_model, seeded, worst_case

import ebm_at
from ebm_at import (
    ATTACKS,
    SUITES,
    BadInput,
    apgd,
    apgd_t,
    attack_loss,
    energy_x,
    exact_logits,
    kl_per_image,
    masking_signs,
    pgd,
    robust_accuracy,
    run_attack,
    square,
)

FAST = dict(steps=3, queries=12)
every_name = pytest.mark.parametrize("name", ATTACKS)


# ------------------------------------------------------------------------------ APGD and Square


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@each_norm
@pytest.mark.parametrize("seed", range(2))
def test_apgd_reaches_the_worst_case_of_a_linear_model(seed, norm, loss):
    net, eps = linear_model(seed), 0.1
    x, y = batch(seed, 9, size=4, classes=2, dtype=torch.float64)
    x = 0.3 + 0.4 * x
    best, gap = worst_case(net, x, y, eps, norm)
    options = dict(norm=norm, loss=loss, until_fooled=False, generator=seeded(0))
    x_adv = apgd(net, x, y, eps, 60, **options)
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-6 if norm == "linf" else 2e-3)
    reached = attack_loss(net(x_adv), y, "margin").double()
    torch.testing.assert_close(reached, gap, rtol=1e-4, atol=1e-5)
    # what can fall does fall, also by the attack that stops there and by the one without gradients
    for found in (
        apgd(net, x, y, eps, 60, norm=norm, loss=loss, generator=seeded(1)),
        apgd_t(net, x, y, eps, 60, norm=norm, generator=seeded(1)),
    ):
        fell = attack_loss(net(found), y, "margin") > 0
        clear = gap.abs() > 1e-3
        assert torch.equal(fell[clear], (gap > 0)[clear])


@pytest.mark.parametrize("seed", range(3))
def test_square_comes_close_to_the_worst_case_of_a_linear_model(seed):
    """A single-pixel window tries every sign in the end, and each pixel's sign counts by itself."""
    net, eps = linear_model(seed, channels=1), 0.1
    x, y = batch(seed, 9, 1, 4, 2, torch.float64)
    x = 0.3 + 0.4 * x
    y = net(x).argmin(1)  # wrong all along ...
    with torch.no_grad():  # ... but for a bias that no attack can overcome: nobody leaves early
        net[1].bias.copy_(torch.zeros(2))
        shift = torch.nn.functional.one_hot(y, 2) * 100.0
    safe = Shifted(net, shift)
    best, gap = worst_case(net, x, y, eps, "linf")
    x_adv = square(safe, x, y, eps, 600, generator=seeded(seed))
    start = square(safe, x, y, eps, 1, generator=seeded(seed))
    reached = attack_loss(net(x_adv), y, "margin").double()
    torch.testing.assert_close(reached, gap, rtol=0.02, atol=1e-3)
    assert (attack_loss(net(start), y, "margin") < reached - 1e-3).any()


class Shifted(nn.Module):
    """A network plus a constant per image: its gradients, but no image of it ever falls."""

    def __init__(self, net, shift):
        super().__init__()
        self.net, self.shift = net, shift

    def forward(self, x):
        return self.net(x) + self.shift


def test_square_schedule_is_that_of_the_paper():
    """Share of the area .8, halved at 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 of 10000."""
    for done, halvings in ((0, 0), (10, 0), (11, 1), (51, 2), (201, 3), (501, 4), (8001, 9)):
        side = ebm_at._window_side(done / 10_000, 32, 32)
        assert side == max(round(math.sqrt(0.8 / 2**halvings) * 32), 1)


def test_checkpoints_of_apgd():
    """p = .22, then gaps of .19, .16 ... but never below .06: Croce & Hein, section 3."""
    expected = [22, 41, 57, 70, 80, 87, 93, 99]
    assert ebm_at._checkpoints(100) == expected
    assert all(1 <= c <= 7 for c in ebm_at._checkpoints(7))


@each_norm
@pytest.mark.parametrize("loss", ["ce", "kl", "margin", "dlr", "energy", "energy-up"])
def test_the_best_point_is_never_worse_than_the_start(loss, norm, tiny_net):
    for seed in range(3):
        net = tiny_net(seed).eval()
        x, y = batch(seed, 12)
        start = (x + 0.02 * torch.randn(x.shape, generator=seeded(seed))).clamp(0, 1)
        start = ebm_at.project(start, x, 0.05, norm)
        reference = net(x).detach()
        options = dict(norm=norm, loss=loss, start=start, until_fooled=False)
        values = [attack_loss(net(start), y, loss, reference)]
        for steps in (1, 5, 20):
            x_adv = apgd(net, x, y, 0.05, steps, **options)
            values.append(attack_loss(net(x_adv), y, loss, reference))
            assert (values[-1] >= values[0] - 1e-4).all()
        assert values[-1].mean() > values[0].mean()


def test_energy_up_prefers_any_fooling_point_and_then_high_energy(tiny_net):
    net = tiny_net(3).eval()
    x, _ = batch(3, 30)
    y = net(x).argmax(1)
    up = apgd(net, x, y, 0.1, 30, loss="energy-up", until_fooled=False, generator=seeded(0))
    down = pgd(net, x, y, 0.1, 30, loss="ce", generator=seeded(0))
    both = (net(up).argmax(1) != y) & (net(down).argmax(1) != y)
    assert both.sum() > 10
    assert (energy_x(net(up)) > energy_x(net(down)))[both].float().mean() > 0.9


@pytest.mark.parametrize("name", ["apgd", "apgd_t", "square"])
@each_norm
def test_what_has_fallen_leaves_the_batch_and_nothing_changes_for_the_rest(name, norm, tiny_net):
    """The same result alone, in any batch and in any order: there is one noise for all images."""
    if (name, norm) == ("square", "l2"):
        pytest.skip("our Square attacks in l_inf only")
    net = tiny_net(1, dtype=torch.float64).eval()
    x, y = batch(1, 10, dtype=torch.float64)
    attack = {"apgd": apgd, "apgd_t": apgd_t, "square": square}[name]
    run = lambda rows: attack(net, x[rows], y[rows], 0.03, 25, norm=norm, generator=seeded(7))  # noqa: E731
    sizes, whole = [], run(torch.arange(10))
    hook = net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    run(torch.arange(10))
    hook.remove()
    assert min(sizes) < 10, "nothing fell: the test would show nothing"
    order = torch.randperm(10, generator=seeded(2))
    torch.testing.assert_close(run(order), whole[order], rtol=0, atol=1e-6)
    alone = torch.cat([run(torch.tensor([i])) for i in range(10)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-6)


def test_apgd_is_at_least_as_strong_as_pgd_on_a_small_network(tiny_net):
    for seed in range(3):
        net = tiny_net(seed).eval()
        x, _ = batch(seed, 64)
        y = net(x).argmax(1)
        weak, strong = (
            (net(f(net, x, y, 0.02, 20, generator=seeded(0))).argmax(1) == y).float().mean()
            for f in (pgd, apgd)
        )
        assert strong <= weak + 0.02


# ------------------------------------------------------------------------------ robust_accuracy


@every_name
@each_norm
def test_every_registered_attack_is_reproducible_and_knows_no_batch(name, norm, tiny_net):
    if (name, norm) == ("square", "l2"):
        pytest.skip("our Square attacks in l_inf only")
    net = tiny_net(2, dtype=torch.float64)
    x, y = batch(2, 7, dtype=torch.float64)
    run = lambda rows, seed=0: run_attack(name, net, x[rows], y[rows], 0.05, norm, seed, **FAST)  # noqa: E731
    whole = run(torch.arange(7))
    assert torch.equal(run(torch.arange(7)), whole)
    order = torch.randperm(7, generator=seeded(3))
    torch.testing.assert_close(run(order), whole[order], rtol=0, atol=1e-6)
    halves = torch.cat([run(torch.arange(3)), run(torch.arange(3, 7))])
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-6)
    if name not in ("fgsm",):
        assert not torch.equal(run(torch.arange(7), 1), whole)
    reach = 3.1 if name == "n-fgsm" else 1
    assert (distance(whole, x, norm) <= reach * 0.05 + 1e-6).all()


@pytest.mark.parametrize("suite", SUITES)
@each_norm
def test_the_worst_case_is_the_worst_and_is_true(suite, norm, tiny_net):
    """Every claim is checked here once more: in the ball, in [0, 1], and misclassified."""
    for seed, classes in ((0, 2), (1, 5)):
        net = tiny_net(seed, classes=classes)
        x, y = batch(seed, 12, classes=classes)
        y[::2] = exact_logits(net, x).argmax(1)[::2]
        modes, eps = [m.training for m in net.modules()], 0.03
        found = robust_accuracy(net, x, y, eps, suite, norm, batch_size=5, **FAST)
        assert [m.training for m in net.modules()] == modes and not net._forward_pre_hooks
        wrong = exact_logits(net, found["x_adv"]).argmax(1) != y
        assert torch.equal(wrong, found["fallen"])
        assert found["robust_acc"] == pytest.approx(1 - wrong.float().mean().item())
        assert (distance(found["x_adv"], x, norm) <= eps + 1e-6).all()
        rows = found["rows"]
        worst = [row["worst"] for row in rows]
        assert worst == sorted(worst, reverse=True) and worst[0] == found["clean_acc"]
        for row in rows[1:]:
            gap = row["delta_energy"] - row["delta_energy_xy"]  # CE = E(x, y) - E(x)
            rise = row["cross_entropy"] - rows[0]["cross_entropy"]
            if suite != "standard":
                assert gap == pytest.approx(rise, abs=1e-4)
                assert row["n"] == 12 and len(row["energies"]) == 12
                if row["attack"] != "n-fgsm":
                    assert row["worst"] <= row["accuracy"] + 1e-6
            assert row["energies"].mean().item() == pytest.approx(row["energy"], abs=1e-4)


def test_batch_size_and_order_change_nothing(tiny_net):
    net = tiny_net(4, dtype=torch.float64)
    x, y = batch(4, 16, dtype=torch.float64)
    order = torch.randperm(16, generator=seeded(0))
    for suite in ("standard", "quick"):
        a = robust_accuracy(net, x, y, 0.02, suite, batch_size=16, **FAST)
        b = robust_accuracy(net, x[order], y[order], 0.02, suite, batch_size=3, **FAST)
        assert torch.equal(a["fallen"][order], b["fallen"])
        torch.testing.assert_close(a["x_adv"][order], b["x_adv"], rtol=0, atol=1e-6)
        for row, other in zip(a["rows"], b["rows"]):
            for key in ("accuracy", "energy", "gradients", "queries", "l2"):
                assert row[key] == pytest.approx(other[key], abs=1e-4), (row["attack"], key)


def test_counts_of_gradients_and_queries(tiny_net):
    net, (x, _) = tiny_net(), batch(0, 6)
    y = exact_logits(net, x).argmax(1)
    rows = robust_accuracy(net, x, y, 0.0, "all", precision="fp32", **FAST)["rows"]
    cost = {row["attack"]: (row["gradients"], row["queries"]) for row in rows}
    assert cost["fgsm"] == cost["rs-fgsm"] == (1, 0)  # at eps 0 nothing falls, so nothing is saved
    assert cost["pgd"] == (3, 0) and cost["pgd-kl"] == cost["pgd-t-least"] == (3, 1)
    assert cost["apgd-ce"] == (4, 0) and cost["square"] == (0, 12)
    assert cost["apgd-t"] == (16, 5)  # 4 wrong classes, their ranking, and each one's verdict


def test_a_claim_in_bf16_counts_only_if_fp32_agrees():
    """A linear model whose margin bf16 rounds to the wrong side of zero at every point."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.copy_(torch.tensor([1.001, 1.0]))  # both are 1 in bf16
    x, y = torch.full((4, 3, 1, 1), 0.5), torch.tensor([0, 0, 1, 1])
    with ebm_at.autocast(x.device, torch.bfloat16):
        rough = net(x)
        claims = torch.tensor([[1.0, 2.0]] * 4)
        assert rough.dtype == torch.bfloat16 and (rough[:, 0] == rough[:, 1]).all()
        assert ebm_at._has_fallen(net, x, y, claims).tolist() == [False] * 4
        assert ebm_at._has_fallen(net, x, y, claims.flip(1)).tolist() == [False, False, True, True]
    found = robust_accuracy(net, x, y, 0.1, ["pgd", "square"], precision="bf16", **FAST)
    assert found["robust_acc"] == 0.5


def test_n_fgsm_outside_the_ball_does_not_count():
    net = linear_model(0).float()
    x, y = batch(0, 20, size=4, classes=2)
    y = exact_logits(net, 0.4 + 0.2 * x).argmax(1)
    found = robust_accuracy(net, 0.4 + 0.2 * x, y, 0.2, ["n-fgsm"])
    assert found["rows"][1]["accuracy"] < found["rows"][0]["accuracy"]
    assert found["robust_acc"] == found["clean_acc"]


def test_the_energies_of_every_attacked_point_obey_the_identities(tiny_net):
    """E3 and the KL identity: KL = sum_k p(k|x) (E(x*, k) - E(x, k)) + E(x) - E(x*)."""
    net = tiny_net(6)
    x, y = batch(6, 10)
    clean = exact_logits(net, x).double()
    for name in ATTACKS:
        adv = exact_logits(net, run_attack(name, net, x, y, 0.05, **FAST)).double()
        ce = F.cross_entropy(adv, y, reduction="none")
        torch.testing.assert_close(ce, -adv.gather(1, y[:, None])[:, 0] + adv.logsumexp(1))
        torch.testing.assert_close(ebm_at.energy_xy(adv, y) - energy_x(adv), ce.float())
        expected = (clean.softmax(1) * (clean - adv)).sum(1) + adv.logsumexp(1) - clean.logsumexp(1)
        found = kl_per_image(clean, adv).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_attacked_once_nothing_stands(tiny_net):
    net, (x, _) = tiny_net(), batch(0, 5)
    wrong = (exact_logits(net, x).argmax(1) + 1) % 5
    found = robust_accuracy(net, x, wrong, 0.1, "standard", **FAST)
    assert found["robust_acc"] == 0 and [r["attack"] for r in found["rows"]] == ["natural"]
    assert torch.equal(found["x_adv"], x)


def test_progress_is_told_after_every_batch(tiny_net):
    told, (x, y) = [], batch(0, 10)
    robust_accuracy(tiny_net(), x, y, 0.1, ["fgsm", "pgd"], batch_size=4, **FAST,
                    on_progress=lambda rows, *rest: told.append((len(rows), *rest)))  # fmt: skip
    assert told == [(1, "fgsm", n, 10) for n in (4, 8, 10)] + [
        (2, "pgd", n, 10) for n in (4, 8, 10)
    ]


# ----------------------------------------------------------------------------- signs of masking


class Wrapped(nn.Module):
    def __init__(self, net, last):
        super().__init__()
        self.net, self.last = net, last

    def forward(self, x):
        return self.last(self.net(x))


def signs_of(net, x, rows=()):
    y = exact_logits(net, x).argmax(1)
    return " ".join(masking_signs(net, x, y, 0.1, rows=rows))


def test_masking_is_noticed(tiny_net):
    net, (x, _) = tiny_net(0).eval(), batch(0, 40)
    assert "not logits" in signs_of(Wrapped(net, lambda z: z.softmax(1)), x)
    assert "log-probabilities" in signs_of(Wrapped(net, lambda z: z.log_softmax(1)), x)
    assert "exactly zero" in signs_of(Wrapped(net, lambda z: 1e4 * z), x)
    assert "turn every image grey" in signs_of(Wrapped(net, lambda z: 1e4 * z), x)
    stairs = Quantised(net)
    assert "exactly zero" in signs_of(stairs, x)
    rows = [dict(attack="apgd-t", worst=0.5, gradients=9), dict(attack="square", worst=0.3)]
    assert "Square" in signs_of(net, x, rows) and "20.0%" in signs_of(net, x, rows)
    rows[0] |= {"attack": "fgsm", "gradients": 1}  # beating one step proves nothing
    assert "Square" not in signs_of(net, x, rows)
    y = exact_logits(net, x).argmax(1)
    found = robust_accuracy(stairs, x, y, 0.1, "standard", steps=5, queries=100)
    assert found["robust_acc"] < found["rows"][2]["worst"], "Square sees through the stairs"


class Quantised(nn.Module):
    """Input rounded to 8 levels: a staircase, whose gradient is zero almost everywhere."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x * 7).round() / 7)


def test_an_honest_network_rouses_no_suspicion(tiny_net):
    x, _ = batch(0, 40)
    assert signs_of(tiny_net(0).eval(), x) == ""


# ------------------------------------------------------------------------------------- refusals


def test_bad_models_images_and_names_are_refused(tiny_net):
    net, (x, y) = tiny_net(), batch()
    nan = Wrapped(net, lambda z: z * math.nan)
    for model, images, labels, more, words in (
        (nan, x, y, {}, "NaN"),
        (Wrapped(net, lambda z: z[:, :1]), x, y * 0, {}, "K >= 2"),
        (Wrapped(net, lambda z: z[:, :, None]), x, y, {}, "K >= 2"),
        (tiny_net(0, 1), x, y, {}, "images of shape"),
        (net, x, y + 1, {}, "model has 5 classes"),
        (net, x, y - 5, {}, "model has 5 classes"),
        (net, x[:0], y[:0], {}, "no images"),
        (net, x * 2 - 1, y, {}, "normalisation"),
        (net, (x * 255).byte(), y, {}, "float"),
        (net, x, y.float(), {}, "int64"),
        (tiny_net().to("meta"), x, y, {}, "move them"),
        (tiny_net(), x, y, dict(suite="standrad"), "'standard'"),
        (tiny_net(), x, y, dict(suite=["pdg"]), "'pgd'"),
        (tiny_net(), x, y, dict(norm="l1"), "linf, l2"),
        (tiny_net(), x, y, dict(precision="fp16"), "precision"),
        (tiny_net(), x, y, dict(steps=-1), "steps must be at least 1"),
        (tiny_net(), x, y, dict(batch_size=0), "batch_size must be at least 1"),
    ):
        with pytest.raises(BadInput, match=words):
            robust_accuracy(model, images, labels, 0.1, **{"suite": "quick"} | more)


def test_settings_that_no_attack_has_are_refused(tiny_net):
    x, y = batch()
    with pytest.raises(BadInput, match="did you mean 'steps'"):
        robust_accuracy(tiny_net(), x, y, 0.1, ["pgd"], stepz=3)


def test_apgd_t_never_calls_the_model_with_an_empty_batch(tiny_net):
    """Models that reshape by x.view(len(x), -1) cannot take one."""
    net, sizes = tiny_net(), []
    net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    x, y = batch(n=4)
    apgd_t(net, x, y, 1.0, 5)
    assert min(sizes) > 0


# --------------------------------------------------------------------------- strangers' models


def switches():
    """How torch computes fp32 products: convolutions and matrices, on GPU and CPU."""
    of = torch.backends
    kinds = of.cudnn.conv, of.cuda.matmul, of.mkldnn.conv, of.mkldnn.matmul
    return [kind.fp32_precision for kind in kinds]


@pytest.mark.parametrize("precision", ["tf32", "ieee", "none"])
def test_claims_are_judged_in_fp32_whatever_switch_was_used(precision, tiny_net, monkeypatch):
    """After the newer fp32_precision has been set, torch refuses to read the older allow_tf32."""
    monkeypatch.setattr(torch.backends, "fp32_precision", precision)
    net, before, seen = tiny_net(), switches(), []
    net.register_forward_pre_hook(lambda *_: seen.append(switches()))
    exact_logits(net, batch()[0])
    ebm_at.evaluate(net, *batch(), 0.1, 1)
    assert len(seen) > 2 and all(s == ["ieee"] * 4 for s in seen) and switches() == before


CUTS = {
    "integers": lambda x: (x * 255).byte().float() / 255,
    "data": lambda x: x.data,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "numpy that raises": lambda x: torch.from_numpy(x.numpy()),
}


class Before(nn.Module):
    """A network that changes its images first."""

    def __init__(self, net, first):
        super().__init__()
        self.net, self.first = net, first

    def forward(self, x):
        return self.net(self.first(x))


@pytest.mark.parametrize("cut", CUTS)
def test_without_a_gradient_only_square_runs_and_the_refusal_says_so(cut, tiny_net):
    net, (x, y) = Before(tiny_net(), CUTS[cut]), batch()
    with pytest.raises(BadInput, match="--attacks square"):
        robust_accuracy(net, x, y, 0.1, "standard", **FAST)
    assert len(robust_accuracy(net, x, y, 0.1, ["square"], **FAST)["rows"]) == 2
    assert "--attacks square" in masking_signs(net, x, y, 0.1)[-1]


def test_weights_made_under_inference_mode_are_refused_in_words(tiny_net):
    with torch.inference_mode():
        net = tiny_net()
    with pytest.raises(BadInput, match="Inference tensors"):
        robust_accuracy(net, *batch(), 0.1, "quick", **FAST)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda n: torch.jit.freeze(torch.jit.script(n)),
                                  lambda n: torch.jit.trace(n, batch()[0])])  # fmt: skip
def test_torchscript_modules_are_attacked_like_any_other(make, tiny_net):
    net, (x, y) = tiny_net().eval(), batch()
    wanted = robust_accuracy(net, x, y, 0.1, "quick", precision="fp32", **FAST)
    found = robust_accuracy(make(net), x, y, 0.1, "quick", precision="fp32", **FAST)
    assert torch.equal(found["fallen"], wanted["fallen"])
    assert found["rows"][1]["gradients"] == wanted["rows"][1]["gradients"]


def test_a_model_that_fails_in_bf16_is_searched_in_fp32_and_says_so(tiny_net):
    net, (x, y) = tiny_net(), batch()
    picky = Wrapped(net, lambda z: z @ torch.eye(5) if z.dtype == torch.float32 else 1 / 0)
    found = robust_accuracy(picky, x, y, 0.1, "quick", precision="bf16", **FAST)
    assert "Searched in fp32" in found["notes"][0]
    wanted = robust_accuracy(net, x, y, 0.1, "quick", precision="fp32", **FAST)
    assert torch.equal(found["fallen"], wanted["fallen"]) and wanted["notes"] == []


def test_models_that_answer_by_chance_or_by_their_batch_are_noticed(tiny_net):
    x, _ = batch(0, 40)
    random = Wrapped(tiny_net(), lambda z: F.dropout(z, 0.2, training=True))
    assert "Asked twice" in signs_of(random, x)
    by_batch = Wrapped(tiny_net(), lambda z: z - 0.5 * z.mean(0))
    assert "Alone" in signs_of(by_batch, x)


class Hole(nn.Module):
    """A network without a finite answer anywhere but at the images it was given."""

    def __init__(self, net, x, value):
        super().__init__()
        self.net, self.x, self.value = net, x, value

    def forward(self, x):
        gap = (x[:, None] - self.x[None]).abs().flatten(2).amax(2).amin(1)
        return torch.where((gap > 1e-3)[:, None], self.value * self.net(x), self.net(x))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("suite", SUITES)
def test_points_without_finite_logits_count_as_fallen_and_are_counted(suite, value, tiny_net):
    net, (x, _) = tiny_net(), batch(0, 8)
    y = exact_logits(net, x).argmax(1)
    hole = Hole(net, x, value)
    found = robust_accuracy(hole, x, y, 0.1, suite, **FAST)
    assert (found["clean_acc"], found["robust_acc"]) == (1, 0)
    rows = found["rows"]
    for row in rows:
        assert len(row["energies"]) == 8 - row["nonfinite"] == 8 * row["accuracy"]
    assert rows[0]["nonfinite"] == 0 and rows[-1]["nonfinite"] == 8
    assert "NaN or infinite" in " ".join(masking_signs(hole, x, y, 0.1, rows=rows))


def test_points_outside_the_ball_are_counted():
    net = linear_model(0).float()
    x = 0.4 + 0.2 * batch(0, 20, size=4, classes=2)[0]
    y = exact_logits(net, x).argmax(1)
    row = robust_accuracy(net, x, y, 0.2, ["n-fgsm"])["rows"][1]
    assert row["outside"] == round(20 * (1 - row["accuracy"])) > 0


def test_square_is_left_out_of_a_suite_in_l2_and_refused_in_a_list(tiny_net):
    found = robust_accuracy(tiny_net(), *batch(), 0.1, "standard", "l2", **FAST)
    assert "square" not in [r["attack"] for r in found["rows"]]
    assert "Square is left out" in found["notes"][0]
    with pytest.raises(BadInput, match="unknown attack in l2 'square'"):
        robust_accuracy(tiny_net(), *batch(), 0.1, ["square"], "l2", **FAST)


def test_a_step_along_a_gradient_that_is_nan_goes_nowhere():
    x, gradient = torch.rand(2, 3, 4, 4), torch.full((2, 3, 4, 4), math.nan)
    for norm in ("linf", "l2"):
        assert torch.equal(ebm_at.ascend(x, gradient, 0.1, norm), x)


def test_restarts_never_leave_more_standing(tiny_net):
    """Ten short runs from ten starts break at least what one breaks, and here more."""
    net, g = tiny_net(3).eval(), torch.Generator().manual_seed(0)
    x = torch.rand(64, 3, 8, 8, generator=g)
    y = net(x).argmax(1)
    left = [
        (net(ebm_at.run_attack("pgd", net, x, y, 0.03, steps=1, restarts=n)).argmax(1) == y)
        for n in (1, 10)
    ]
    assert (left[1] <= left[0]).all() and left[1].sum() < left[0].sum()
