"""APGD, Square and robust_accuracy: optima, schedules, honest claims, and strangers' models."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_attacks import batch, distance, each_norm, linear_case, seeded, worst_case

from ebm_at import (
    SUITES, BadInput, apgd, apgd_checkpoints, apgd_t, cross_entropy, dlr, evaluate,
    exact_logits, fooling_and_unlikely, likelier, margin, masking_signs, pgd, robust_accuracy,
    square, square_side,
)  # fmt: skip

FAST = dict(steps=3, queries=12)


def stranger(function):
    """A stranger's model: any function from images to logits."""
    model = nn.Module()
    model.forward = function
    return model


@pytest.fixture
def net(tiny_net):
    return tiny_net(3).eval()


def predicted(net, n=12):
    """Images, and the labels that the network gives them."""
    x, _ = batch(0, n)
    return x, exact_logits(net, x).argmax(1)


@each_norm
def test_apgd_reaches_the_worst_case_of_a_linear_model(norm):
    for seed, loss in ((0, cross_entropy), (1, margin), (2, dlr)):
        (net, x, y), eps, options = linear_case(seed), 0.1, dict(norm=norm, generator=seeded(0))
        best, gap = worst_case(net, x, y, eps, norm)
        x_adv = apgd(net, x, y, eps, 60, loss=loss, until_fooled=False, **options)
        torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-6 if norm == "linf" else 2e-3)
        torch.testing.assert_close(margin(net(x_adv), y).double(), gap, rtol=1e-4, atol=1e-5)
        clear = gap.abs() > 1e-3  # what can fall does fall, also by the attacks that stop there
        for attack in (apgd, apgd_t):
            fell = margin(net(attack(net, x, y, eps, 60, **options)), y) > 0
            assert torch.equal(fell[clear], (gap > 0)[clear])


def test_square_comes_close_to_the_worst_case_of_a_linear_model():
    """A single-pixel window tries every sign in the end, and each pixel's sign counts by itself."""
    (net, x, _), y = linear_case(0, channels=1), torch.arange(9) % 2
    safe = stranger(lambda z: net(z) + 100.0 * F.one_hot(y, 2))  # nobody falls and leaves early
    _, gap = worst_case(net, x, y, 0.1, "linf")
    reached = margin(net(square(safe, x, y, 0.1, 600, generator=seeded(0))), y).double()
    torch.testing.assert_close(reached, gap, rtol=0.02, atol=1e-3)


def test_schedules_are_those_of_the_papers():
    """Square's window halves at 10, 50, 200 ... of 10000 queries; APGD's gaps shrink by 3%."""
    for done, halvings in ((0, 0), (10, 0), (11, 1), (51, 2), (201, 3), (501, 4), (8001, 9)):
        side = max(round(math.sqrt(0.8 / 2**halvings) * 32), 1)
        assert square_side(done / 10_000, 32, 32) == side
    assert sorted(apgd_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


@each_norm
def test_apgd_returns_the_best_point_it_saw_and_climbs_higher_than_pgd(norm, tiny_net):
    seen, net = [], tiny_net(1).eval()
    (x, y), watched = predicted(net, 32), stranger(lambda z: seen.append(net(z)) or seen[-1])
    away = lambda f, y: -margin(f, y)  # noqa: E731
    for loss in (cross_entropy, margin, dlr, likelier, fooling_and_unlikely, away):
        for until_fooled in (False, True):  # any fooling point, or that of the highest loss
            options = dict(norm=norm, loss=loss, until_fooled=until_fooled, generator=seeded(0))
            seen.clear()
            found = net(apgd(watched, x, y, 0.2, 20, **options))
            judge = (lambda f, y: f.argmax(1) != y) if until_fooled else loss
            best = torch.stack([judge(f, y).float() for f in seen]).amax(0)
            torch.testing.assert_close(judge(found, y).float(), best)
    budget, options = (net, x, y, 0.2, 40), dict(norm=norm, generator=seeded(0))
    points = pgd(*budget, **options), apgd(*budget, until_fooled=False, **options)
    low, high = (cross_entropy(net(z), y).mean() for z in points)
    assert high > low


@pytest.mark.parametrize("attack", [apgd_t, square])
def test_what_has_fallen_leaves_the_batch_which_is_never_empty(attack, net):
    """Models that reshape by x.view(len(x), -1) cannot take an empty one."""
    sizes, (x, y) = [], predicted(net, 10)
    counted = stranger(lambda z: sizes.append(len(z)) or net(z))
    for eps in (0.03, 0.3, 1.0):  # some fall, all fall
        attack(counted, x, y, eps, 40, generator=seeded(7))
    assert 0 < min(sizes) < 10


@pytest.mark.parametrize("suite", SUITES)
@each_norm
def test_the_worst_case_is_the_worst_and_is_true(suite, norm, tiny_net):
    """Every claim is checked here once more: in the ball, in [0, 1], and misclassified."""
    for seed, classes in ((0, 2), (1, 5)):
        net, (x, y), eps = tiny_net(seed, classes=classes), batch(seed, 12, classes=classes), 0.03
        y[::2] = exact_logits(net, x).argmax(1)[::2]
        found = robust_accuracy(net, x, y, eps, suite, norm, batch_size=5, **FAST)
        assert all(m.training for m in net.modules()) and not net._forward_pre_hooks
        wrong = exact_logits(net, found["x_adv"]).argmax(1) != y
        assert torch.equal(wrong, found["fallen"])
        assert found["robust_acc"] == pytest.approx(1 - wrong.float().mean().item())
        assert (distance(found["x_adv"], x, norm) <= eps + 1e-6).all()
        assert found["x_adv"].min() >= 0 and found["x_adv"].max() <= 1
        rows, worst = found["rows"], [row["worst"] for row in found["rows"]]
        assert worst == sorted(worst, reverse=True) and worst[0] == found["clean_acc"]
        for row in rows[1:]:
            assert row["energies"].mean().item() == pytest.approx(row["energy"], abs=1e-4)
            if suite != "standard":  # whose rows are about ever fewer images
                moved = row["delta_energy"] - row["delta_energy_xy"]  # CE = E(x, y) - E(x)
                rise = row["cross_entropy"] - rows[0]["cross_entropy"]
                assert moved == pytest.approx(rise, abs=1e-4)
                assert row["n"] == len(row["energies"]) == 12
                assert row["worst"] <= row["accuracy"] + 1e-6 or row["attack"] == "n-fgsm"


def test_the_seed_decides(net):
    a, b, c = (robust_accuracy(net, *predicted(net), 0.05, ["pgd"], seed=seed, **FAST)["x_adv"]
               for seed in (4, 4, 5))  # fmt: skip
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_counts_of_gradients_and_queries(net):
    """At eps 0 nothing falls, so nothing is saved; what has fallen costs nothing."""
    x, y = predicted(net)
    rows = robust_accuracy(net, x, y, 0.0, "all", **FAST)["rows"]
    cost = {row["attack"]: (row["gradients"], row["queries"]) for row in rows}
    assert cost["fgsm"] == cost["rs-fgsm"] == (1, 0)
    assert cost["pgd"] == (3, 0) and cost["pgd-kl"] == cost["pgd-t-least"] == (3, 1)
    assert cost["apgd-ce"] == (4, 0) and cost["square"] == (0, 12)
    assert cost["apgd-t"] == (16, 5)  # 4 wrong classes, their ranking, and each one's verdict
    found = robust_accuracy(net, x, (y + 1) % 5, 0.1, "standard", **FAST)
    assert found["robust_acc"] == 0 and len(found["rows"]) == 1 and torch.equal(found["x_adv"], x)


def test_points_outside_the_ball_are_counted_but_do_not_count():
    net, x, _ = linear_case(0)
    found = robust_accuracy(net, x, exact_logits(net, x).argmax(1), 0.2, ["n-fgsm"])
    assert found["rows"][1]["outside"] == round(9 * (1 - found["rows"][1]["accuracy"])) > 0
    assert found["robust_acc"] == found["clean_acc"] == 1


@pytest.mark.parametrize("eps", [0.01, 1.0])
def test_progress_is_told_after_every_batch(eps, net):
    told, options = [], dict(batch_size=4, restarts=3, **FAST)
    robust_accuracy(net, *predicted(net, 10), eps, ["fgsm", "pgd"], **options,
                    on_progress=lambda rows, *rest: told.append((len(rows), *rest)))  # fmt: skip
    assert told == [(i, a, n, 10) for i, a in ((1, "fgsm"), (2, "pgd")) for n in (4, 8, 10)]


def test_restarts_never_leave_more_standing(net):
    given = net, *predicted(net, 64), 0.03, ["pgd"]
    once, often = (robust_accuracy(*given, steps=1, restarts=n)["fallen"] for n in (1, 10))
    assert (often >= once).all() and often.sum() > once.sum()


@pytest.mark.parametrize("word, defence", [
    ("softmax", lambda net: lambda x: net(x).softmax(1)),
    ("softmax", lambda net: lambda x: net(x).log_softmax(1)),
    ("exactly zero", lambda net: lambda x: 1e4 * net(x)),
    ("every image grey", lambda net: lambda x: net((x * 7).round() / 7)),
    ("Asked twice", lambda net: lambda x: F.dropout(net(x), 0.2)),
    ("Alone", lambda net: lambda x: net(x) - 0.5 * net(x).mean(0)),
    # the loss rises for half an eps (.1) of the first pixel from .5, and falls back
    ("catastrophic", lambda net: lambda x: torch.stack(
        [0.3 - (10 * math.pi * (x[:, 0, 0, 0] - 0.5)).sin(), 0 * x[:, 0, 0, 0]], 1)),
])  # fmt: skip
def test_masking_is_noticed(word, defence, net):
    x, y = predicted(net, 40)
    assert masking_signs(net, x, y, 0.1) == []  # an honest network rouses no suspicion
    x[:, 0, 0, 0], model = 0.5, stranger(defence(net))
    assert word in " ".join(masking_signs(model, x, exact_logits(model, x).argmax(1), 0.1))


def test_square_that_breaks_what_gradients_left_standing_is_noticed(net):
    x, y = predicted(net, 40)
    stairs = stranger(lambda z: net((z * 7).round() / 7))  # its gradient is zero almost everywhere
    rows = robust_accuracy(stairs, x, y, 0.1, "standard", steps=5, queries=100)["rows"]
    assert rows[-1]["attack"] == "square" and rows[-1]["worst"] < rows[-2]["worst"]
    assert "Square" in " ".join(masking_signs(stairs, x, y, 0.1, rows=rows))
    rows[-2]["gradients"] = 1  # beating one step proves nothing
    assert "Square" not in " ".join(masking_signs(stairs, x, y, 0.1, rows=rows))


def test_bad_models_images_and_names_are_refused(tiny_net):
    net, (x, y) = tiny_net(), batch()
    made_there = torch.inference_mode()(tiny_net)()
    for word, model, images, labels, more in (
        ("NaN", stranger(lambda z: net(z) * math.nan), x, y, {}),
        ("K >= 2", stranger(lambda z: net(z)[:, :1]), x, y * 0, {}),
        ("K >= 2", stranger(lambda z: net(z)[:, :, None]), x, y, {}),
        ("images of shape", tiny_net(0, 1), x, y, {}), ("no images", net, x[:0], y[:0], {}),
        ("images of shape", tiny_net().half(), x, y, {}), ("float32", net, x.half(), y, {}),
        ("device", tiny_net().to("meta"), x, y, {}), ("Inference tensors", made_there, x, y, {}),
        ("model has 5 classes", net, x, y + 1, {}), ("model has 5 classes", net, x, y - 5, {}),
        ("'standard'", net, x, y, dict(suite="standrad")),
        ("'pgd'", net, x, y, dict(suite=["pdg"])), ("linf, l2", net, x, y, dict(norm="l1")),
        ("in l2 'square'", net, x, y, dict(suite=["square"], norm="l2")),
        ("steps must be at least 1", net, x, y, dict(steps=-1)),
        ("batch_size must be at least 1", net, x, y, dict(batch_size=0)),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            robust_accuracy(model, images, labels, 0.1, **{"suite": "quick"} | more)


def test_claims_are_judged_in_fp32_whatever_switch_was_used(net, monkeypatch):
    """After the newer fp32_precision has been set, torch refuses to read the older allow_tf32."""
    of, x, seen = torch.backends, batch()[0], []
    kinds = of.cudnn.conv, of.cuda.matmul, of.mkldnn.conv, of.mkldnn.matmul
    watched = stranger(lambda z: seen.append([kind.fp32_precision for kind in kinds]) or net(z))
    for precision in ("tf32", "ieee", "none"):
        monkeypatch.setattr(torch.backends, "fp32_precision", precision)
        before = [kind.fp32_precision for kind in kinds]
        with torch.autocast("cpu", torch.bfloat16):
            logits = exact_logits(watched, x)
        torch.testing.assert_close(logits, net(x), rtol=0, atol=1e-6)
        robust_accuracy(watched, *batch(), 0.1, ["square"], **FAST)
        evaluate(watched, *batch(), 0.1, 1)
        assert [kind.fp32_precision for kind in kinds] == before
    assert len(seen) > 9 and all(precisions == ["ieee"] * 4 for precisions in seen)


@pytest.mark.parametrize("cut", [
    lambda x: (x * 255).byte().float() / 255, lambda x: x.data,
    lambda x: torch.from_numpy(x.detach().numpy()), lambda x: torch.from_numpy(x.numpy()),
], ids=["integers", "data", "numpy", "numpy that raises"])  # fmt: skip
def test_without_a_gradient_only_square_runs_and_the_refusal_says_so(cut, net):
    blind, (x, y) = stranger(lambda x: net(cut(x))), batch()
    with pytest.raises(BadInput, match="--attacks square"):
        robust_accuracy(blind, x, y, 0.1, "standard", **FAST)
    assert len(robust_accuracy(blind, x, y, 0.1, ["square"], **FAST)["rows"]) == 2
    assert "--attacks square" in masking_signs(blind, x, y, 0.1)[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_modules_are_attacked_like_any_other(net):
    script, (x, y) = torch.jit.script(net), batch()
    wanted = robust_accuracy(net, x, y, 0.1, "quick", **FAST)
    for module in (script, torch.jit.freeze(script), torch.jit.trace(net, x)):
        found = robust_accuracy(module, x, y, 0.1, "quick", **FAST)
        assert torch.equal(found["fallen"], wanted["fallen"]) and found["rows"][1]["gradients"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("suite", [*SUITES, ["square"]])
def test_points_without_finite_logits_count_as_fallen_and_are_counted(suite, value, net):
    (x, _), y = batch(0, 8), torch.zeros(8, dtype=torch.int64)

    def hole(z):  # sure of class 0, but without a finite answer anywhere but at x
        far = (z[:, None] - x).abs().flatten(2).amax(2).amin(1) > 1e-3
        return (net(z) + 100 * torch.eye(5)[0]) * torch.where(far, value, 1.0)[:, None]

    found = robust_accuracy(stranger(hole), x, y, 0.1, suite, **FAST)
    assert (found["clean_acc"], found["robust_acc"]) == (1, 0)
    for row in (rows := found["rows"]):
        assert len(row["energies"]) == 8 - row["nonfinite"] == 8 * row["accuracy"]
    assert rows[0]["nonfinite"] == 0 and rows[-1]["nonfinite"] == 8
    assert "NaN or infinite" in " ".join(masking_signs(stranger(hole), x, y, 0.1, rows=rows))
