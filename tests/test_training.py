"""The loop: schedules, one step, resume, overfitting and reactions, settings, several processes."""

import copy
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ebm_at
from ebm_at import BadInput, RunError, Trainer, load_checkpoint, lr_at, recipe, save_run

TINY = dict(width=8, batch_size=20, epochs=3, probe_size=20, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def data():
    return ebm_at.load_data("shapes", limit=100)


def rows(records):
    """History rows without the two columns that are measured in seconds, as text: nan != nan."""
    columns = sorted(set(ebm_at.HISTORY) - {"seconds", "probe_seconds"})
    return [repr([r[k] for k in columns]) for r in records if r.get("kind") != "alarm"]


class Collapsing(Trainer):
    """A trainer whose validation measurements collapse in the epochs `bad`, until DER is on."""

    bad, der_helps = (2, 3, 4), True

    def measure(self):
        bad = self.epoch in self.bad and not (self.config.der and self.der_helps)
        healthy = dict(val_fgsm_acc=0.3, val_pgd_acc=0.2 + 0.001 * self.epoch)
        return super().measure() | (dict(val_fgsm_acc=0.6, val_pgd_acc=0.0) if bad else healthy)


def test_schedules_at_their_corners():
    at = lambda kind, *ts: [lr_at(recipe(lr=0.2, schedule=kind), t) for t in ts]  # noqa: E731
    assert at("triangular", 0, 0.2, 0.4, 0.7) == pytest.approx([0, 0.1, 0.2, 0.1])
    assert at("piecewise", 0.49, 0.5, 0.75) == pytest.approx([0.2, 0.02, 0.002])
    assert at("cosine", 0, 0.5) == pytest.approx([0.2, 0.1]) and at("constant", 0.9) == [0.2]
    grows = ebm_at.Config(eps=0.08, eps_warmup=2.0)
    assert [ebm_at.eps_at(grows, t) for t in (0, 1, 2, 5)] == pytest.approx([0, 0.04, 0.08, 0.08])


@pytest.mark.parametrize("method", list(ebm_at.METHODS))
def test_training_lowers_its_own_loss(data, method):
    trainer = Trainer(recipe(method=method, eps=4 / 255, attack_steps=2, **TINY), data)
    losses = [trainer.step(torch.arange(20), torch.Generator(), 0.3)[0].item() for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("statistics", ["train", "eval"])
def test_step_is_sgd_on_the_written_loss(data, statistics):
    """One FGSM + DER step against plain autograd and the SGD formula, written out here."""
    config = recipe(der=True, beta=1.4, der_ramp=0.5, eps=8 / 255, eps_warmup=0.0,
                    attack_bn=statistics, **TINY)  # fmt: skip
    trainer = Trainer(config, data)
    model, plain = trainer.model.train(), copy.deepcopy(trainer.model)
    loss, *tracked = trainer.step(torch.arange(20), torch.Generator(), 0.75)  # of 3 epochs

    x, y = data.x_train[:20].float() / 255, data.y_train[:20]
    probe = x.clone().requires_grad_(True)
    F.cross_entropy(plain.train(statistics == "train")(probe), y).backward()
    plain.train().zero_grad()
    clean, adv = plain(x), plain((x + 8 / 255 * probe.grad.sign()).clamp(0, 1))
    ce = lambda logits: F.cross_entropy(logits, y, reduction="none")  # noqa: E731
    dx = adv.logsumexp(1) - clean.logsumexp(1)
    dxy = (adv - clean).gather(1, y[:, None])[:, 0]
    expected = ce(adv).mean() + 0.7 * (dx**2 + dxy**2).sqrt().mean()  # half of the ramp: beta / 2
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = [adv.argmax(1) == y, ce(adv) < ce(clean), dx, dxy]  # what the step tells for nothing
    for told, value in zip(tracked, wanted, strict=True):
        assert told.item() == pytest.approx(value.float().mean().item(), abs=1e-5)
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        slope = theirs.grad + config.weight_decay * theirs.detach()
        want = theirs.detach() - lr_at(config, 0.25) * slope
        torch.testing.assert_close(mine.detach(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cut, kind, extra", [
    (0, Trainer, dict(method="pgd", attack_steps=2, augment="crop-flip")),
    (1, Trainer, dict(method="n-fgsm", grad_align=0.2, norm="l2", eps=0.5, momentum=0.0)),
    (2, Trainer, dict(method="rs-fgsm", der=True, awp=0.01, schedule="piecewise")),
    (3, Collapsing, dict(on_overfit="der", epochs=4)),  # a rescue survives, too
])  # fmt: skip
def test_resume_equals_uninterrupted(data, tmp_path, cut, kind, extra):
    """Bit for bit: history and weights, wherever the run was cut; another seed gives another."""
    config = recipe(**TINY | extra)
    whole, other = kind(config, data), dataclasses.replace(config, seed=99)
    wanted = rows(whole.run())
    assert rows([next(kind(other, data).run())]) != wanted[:1]
    save_run(kind(config, data), tmp_path)
    run, got = kind(config, data).run(tmp_path), []
    while len(rows(got)) < cut:
        got.append(next(run))
    saved, fresh = load_checkpoint(tmp_path / "last.pt"), ebm_at.build_model(other, data)
    again = kind(config, data, fresh, saved)  # the weights it is given must not matter
    assert rows(got + list(again.run(tmp_path))) == wanted
    weights = whole.model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in again.model.state_dict().items())


def test_resumes_that_cannot_be_meant_are_refused(data, tmp_path):
    config = recipe(**TINY)
    list(ebm_at.train(config, data, folder=tmp_path))
    saved = load_checkpoint(tmp_path / "last.pt")
    shorter = dataclasses.replace(config, epochs=2, eps_warmup=0.0)  # at a negative learning rate?
    assert list(ebm_at.train(shorter, data, resume=saved)) == []
    with pytest.raises(BadInput, match="ended at epoch 3: start a new one"):
        Trainer(dataclasses.replace(config, epochs=4), data, resume=saved)
    with pytest.raises(RunError, match="training images are not those"):
        Trainer(config, dataclasses.replace(data, x_train=data.x_train.flip(0)), resume=saved)
    state = saved["training"]
    for name, value in (
        ("epoch", "3"), ("epoch", 2), ("history", [{}] * 3), ("restarted", 5), ("alarms", [{}]),
        ("best", state["best"] | {"accuracy": None}), ("best", state["best"] | {"weights": {}}),
        ("optimizer", state["optimizer"] | {"param_groups": 3}),
        ("optimizer", state["optimizer"] | {"state": {0: {"momentum_buffer": "x"}}}),
        ("optimizer", state["optimizer"] | {"state": {0: {"momentum_buffer": torch.zeros(2)}}}),
    ):  # fmt: skip
        with pytest.raises(RunError, match="does not fit this run"):
            Trainer(config, data, resume={"training": state | {name: value}})


def test_best_is_chosen_on_validation_and_the_model_handed_over_in_eval_mode(data, tmp_path):
    config = recipe(**TINY)
    model = ebm_at.build_model(config, data)
    history = list(ebm_at.train(config, data, model, folder=tmp_path))
    kept, checkpoint = ebm_at.load_model(tmp_path / "best.pt")
    best = max(history, key=lambda r: r["val_pgd_acc"])  # max takes the first of equals, as we do
    assert checkpoint["epoch"] == best["epoch"]
    some = [i * 550 // 20 for i in range(20)]  # spread: folders are sorted by class
    found = ebm_at.evaluate(kept, data.x_val[some], data.y_val[some], config.eps)
    assert found["pgd_acc"] == pytest.approx(best["val_pgd_acc"])
    x, before = data.x_test[:20].float() / 255, copy.deepcopy(model.state_dict())
    torch.testing.assert_close(model(x), ebm_at.load_model(tmp_path / "last.pt")[0](x))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_divergence_is_named_and_the_last_good_checkpoint_kept(data, tmp_path, what):
    class Diverging(Trainer):
        def step(self, rows, generator, epochs_done):
            found = super().step(rows, generator, epochs_done)
            if what == "weights" and epochs_done > 1 + 3.9 / 5:  # after the last step's loss
                self.model.head.weight.data.fill_(math.nan)
            return found * (math.nan if what == "loss" and epochs_done > 1 + 1.9 / 5 else 1)

    with pytest.raises(RunError, match="NaN in epoch 2"):
        list(Diverging(recipe(**TINY), data).run(tmp_path))
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved["epoch"] == 1 and all(t.isfinite().all() for t in saved["model"].values())


def test_robust_overfitting_needs_decay_and_rising_training_accuracy():
    decaying, rising = [0.3, 0.3, 0.3, 0.2, 0.2, 0.2], [0.3, 0.35, 0.4, 0.6, 0.8, 0.9]
    why = ebm_at.robust_overfitting(decaying, rising, 400)
    assert all(word in why for word in ("30.0%", "20.0%", "35.0%", "76.7%"))
    assert not ebm_at.robust_overfitting(decaying, [0.3] * 6, 400)
    assert not ebm_at.robust_overfitting([0.3] * 6, rising, 400)
    assert not ebm_at.robust_overfitting([0.3] * 4 + [0.25, 0.3], rising, 400)  # one noisy epoch
    assert not ebm_at.robust_overfitting(decaying, rising, 40)  # 1.5 standard errors: 10.9 points
    assert not ebm_at.robust_overfitting(decaying[2:4], rising[2:4], 400)  # too few to judge


@pytest.mark.parametrize("method, warmup, accuracies, verdict", [  # validation: PGD, FGSM; training
    ("fgsm", 0, [(0.1, 0.1, 0.1)], "at chance"),  # a green "healthy" alone would mislead
    ("fgsm", 0, [(0.12, 0.17, 0.2), (0.17, 0.22, 0.2)], "healthy"),
    ("fgsm", 0, [(0.19, 0.25, 0.2), (0.22, 0.45, 0.4)], "healthy"),  # FGSM runs ahead, PGD holds
    ("fgsm", 0, [(0.3, 0.4, 0.4), (0.15, 0.18, 0.18)], "decayed"),  # less of both
    ("none", 0, [(0.0, 0.9, 0.9)], "not robust"),
    ("fgsm", 0, [(0.2, 0.3, 0.3), (0.02, 0.65, 0.6)], "CO"),
    ("fgsm", 0, [(0.01, 0.7, 0.7)], "CO"),  # never was robust, but masters its own attack
    ("fgsm", 0, [(0.0, 0.2, 0.2)], "at chance"),  # PGD accuracy that never was cannot fall
    ("fgsm", 2.5, [(0.2, 0.3, 0.3), (0.0, 0.6, 0.6)], "at chance"),  # measured at full eps
    ("fgsm", 0, [(0.2, 0.3, 0.3), (0.03, 0.08, 0.6)], "CO"),  # FGSM in eval mode misses it
    ("pgd", 0, [(0.2, 0.3, 0.3), (0.03, 0.08, 0.6)], "at chance"),  # its attack is not FGSM
    ("pgd", 0, [(0.5, 0.5, 0.3)] * 3 + [(0.2, 0.3, 0.9)] * 3, "RO"),
])  # fmt: skip
def test_verdicts_on_hand_made_histories(data, method, warmup, accuracies, verdict):
    more = dict(method=method, eps_warmup=warmup, probe_size=10_000)
    trainer = Trainer(recipe(**TINY | more), data)
    names, trainer.epoch = ("val_pgd_acc", "val_fgsm_acc", "train_adv_acc"), len(accuracies)
    trainer.history = [dict(zip(names, row), epoch=i, val_delta_energy_pgd=0.0)
                       for i, row in enumerate(accuracies, 1)]  # fmt: skip
    found, why = trainer.verdict()
    assert found == verdict and f"{accuracies[-1][0]:.1%}" in why


@pytest.mark.parametrize(
    "reaction, epochs", [("continue", 4), ("stop", 2), ("rollback", 2), ("der", 6)]
)
def test_reactions(data, tmp_path, reaction, epochs):
    config = recipe(on_overfit=reaction, **TINY | dict(epochs=4))
    trainer, states, alarms = Collapsing(config, data), {}, []
    for record in trainer.run(tmp_path):
        if record["kind"] == "alarm":
            alarms.append(record)
            assert bool(trainer.optimizer.state) == (reaction != "der"), "momentum of the collapse"
        else:
            states[record["epoch"]] = copy.deepcopy(trainer.model.state_dict())
    (alarm,) = alarms  # only the first of a kind is told
    assert (alarm["verdict"], alarm["epoch"], alarm["action"]) == ("CO", 2, reaction)
    assert alarm["back_to_epoch"] == 1 and len(trainer.history) == epochs
    back = all(torch.equal(states[2][k], states[1][k]) for k in states[1])
    assert back == (reaction in ("rollback", "der")), "the best state comes back only when asked to"
    assert trainer.config.der == (reaction == "der") and not config.der  # the caller's own stays
    verdict = trainer.verdict()[0]
    assert verdict == ("healthy" if reaction == "der" else "CO")
    again = Collapsing(config, data, resume=load_checkpoint(tmp_path / "last.pt"))
    assert list(again.run()) == [] and again.verdict()[0] == verdict  # taken up to be measured


def test_der_that_is_yet_to_come_is_no_reason_to_give_up(data):
    """An alarm before der_from: the rescue switches DER on; its end is judged by the best epoch."""
    trainer = Collapsing(recipe(on_overfit="der", der=True, der_from=0.9, **TINY), data)
    trainer.bad, trainer.der_helps = (2,), False
    (alarm,) = [r for r in trainer.run() if r["kind"] == "alarm"]
    assert (alarm["action"], alarm["der"]) == ("der", False) and trainer.config.der_from == 0
    done = (trainer.epoch - 1 + 4 / 5) / trainer.config.epochs  # the last of 5 steps
    assert trainer.beta == pytest.approx(ebm_at.beta_at(trainer.config, done)) and done > 0.6
    assert trainer.diagnose()[0] == "healthy"
    trainer.best["accuracy"] = 0.5
    assert trainer.diagnose()[0] == "decayed"
    late = Trainer(recipe(on_overfit="der", der=True, der_from=0.9, **TINY), data)
    late.diagnose, late.beta, late.history = lambda: ("RO", ""), 0.0, [{}]
    assert late.react()["action"] == "der" and late.config.der_from == 0.9  # from RO: stays late


def test_the_commonest_class_for_all_is_at_chance(data):
    y = torch.where(torch.arange(len(data.y_val)) % 5 < 3, 0, data.y_val)  # 60% are one class
    trainer = Trainer(recipe(**TINY | dict(probe_size=10_000)), dataclasses.replace(data, y_val=y))
    row = dict(epoch=3, val_fgsm_acc=0.58, train_adv_acc=0.5, val_delta_energy_pgd=0.0)
    for accuracy, verdict in ((0.58, "at chance"), (0.8, "healthy")):
        trainer.history = [row | {"val_pgd_acc": accuracy}]
        assert trainer.diagnose()[0] == verdict


def test_rescue_restarts_the_schedule_and_gives_up_when_der_fails_too(data, tmp_path):
    """Healthy, collapse, healthy with DER, collapse again: the best state comes back, and stop."""
    config = recipe(on_overfit="der", **TINY | dict(epochs=6))
    trainer = Collapsing(config, data)
    trainer.bad, trainer.der_helps = (2, 4), False
    actions = [r["action"] for r in trainer.run(tmp_path) if r["kind"] == "alarm"]
    assert actions == ["der", "rollback"] and len(trainer.history) == 4
    # 5 steps an epoch; the last of epoch 3 lies at 4/5 of the first of 6 epochs: all begins anew.
    assert trainer.history[2]["lr"] == pytest.approx(config.lr * (4 / 5) / 6 / 0.4)
    assert trainer.verdict()[0] == "CO"
    best = load_checkpoint(tmp_path / "best.pt")["model"]
    assert all(torch.equal(v, best[k]) for k, v in trainer.model.state_dict().items())


@pytest.mark.parametrize("settings, words", [
    (dict(method="fsgm"), "did you mean 'fgsm'"), (dict(epoch=5), "did you mean 'epochs'"),
    (dict(model="wrn28-10"), "did you mean 'wrn-28-10'"), (dict(eps=8.0), "did you mean 8/255"),
    (dict(eps=math.nan), "eps must"), (dict(eps_warmup=3.0, epochs=3), "never ends"),
    (dict(lr=0.0), "lr must lie in 1e-09"), (dict(lr_drops="0.5,2"), "lr_drops are shares"),
    (dict(method="none", der=True), "'none' makes no adversarial images"),
    (dict(compile=True, grad_align=0.2), "second derivatives"),
])  # fmt: skip
def test_recipe_refuses(settings, words):
    with pytest.raises(BadInput, match=words):
        recipe(**settings)


def test_what_does_not_fit_data_or_machine_is_refused(data, monkeypatch):
    with pytest.raises(BadInput, match="batch_size 101 exceeds the 100"):
        Trainer(recipe(**TINY | dict(batch_size=101)), data)
    with pytest.raises(RunError, match="cuda:7"):
        ebm_at.pick_device("cuda:7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="start with torchrun, or unset WORLD_SIZE"):
        ebm_at.start_processes("cpu")


def test_recipes_follow_their_sources():
    for dataset, method, given, wanted in (
        ("cifar10", "rs-fgsm", {}, dict(epochs=30, lr=0.2, schedule="triangular", lr_peak=0.5)),
        ("cifar10", "pgd", {}, dict(epochs=200, lr=0.1, schedule="piecewise", eps=8 / 255)),
        ("cifar10", "mart", {}, dict(lr=0.01, weight_decay=3.5e-3, method_beta=5.0)),
        ("cifar10", "mart", dict(model="wrn-34-10"), dict(lr=0.1, weight_decay=7e-4, epochs=120)),
        ("cifar10", "trades", dict(awp=0.005), dict(epochs=76, weight_decay=2e-4, awp_warmup=10)),
        ("cifar10", "fgsm", dict(grad_align=0.2), dict(lr=0.3, augment="crop-flip")),
        ("svhn", "n-fgsm", {}, dict(lr=0.05, eps_warmup=5.0, augment="crop")),  # a mirrored digit
        ("svhn", "pgd", {}, dict(lr=0.01, attack_step=1 / 255)),  # is another sign
        ("shapes", "pgd", dict(norm="l2"), dict(eps=128 / 255, attack_step=15 / 255)),
    ):  # fmt: skip
        found = vars(recipe(dataset, method, **given))
        assert {k: found[k] for k in wanted} == pytest.approx(wanted), (dataset, method, given)
    trades, late = recipe("cifar10", "trades"), recipe("cifar10", "pgd", der=True)
    assert [lr_at(trades, epoch / 76) for epoch in (74, 75)] == pytest.approx([0.1, 0.01])
    assert [ebm_at.beta_at(late, t) for t in (0.79, 0.8)] == [0.0, 6.0] and late.gamma == 0.2


def test_the_mean_over_abnormal_images_is_that_of_all_processes(monkeypatch):
    """Of two processes with 20 and 40 images: the mean of their losses is the whole batch's."""
    g = torch.Generator().manual_seed(0)
    model, y = nn.Linear(4, 3), torch.arange(60) % 3
    x, x_adv = torch.rand(60, 4, generator=g), torch.rand(60, 4, generator=g)
    config = recipe(der=True, der_on="abnormal")
    count = ebm_at.abnormal(model(x), model(x_adv), y).sum()

    def penalty(rows):
        loss, logits = ebm_at.training_loss(model, x[rows], y[rows], x_adv[rows], None, 2.0, config)
        return loss - F.cross_entropy(logits, y[rows])

    whole = penalty(slice(60))
    monkeypatch.setattr(ebm_at, "mean_over_processes", lambda _: [count / 2])
    torch.testing.assert_close((penalty(slice(20)) + penalty(slice(20, 60))) / 2, whole)
    assert count > 10 and whole > 0


def main(folder):
    """What torchrun starts below: each process saves the run it saw into a folder of its own."""
    ebm_at.start_processes("cpu")
    own = Path(folder, str(ebm_at.world()[0]))
    own.mkdir()
    config = recipe(method="rs-fgsm", awp=0.01, der=True, der_on="abnormal", **TINY)
    trainer = Trainer(config, ebm_at.load_data("shapes", limit=100))
    list(trainer.run(own))
    torch.save([rows(trainer.history), *(p.data for p in trainer.model.parameters())], f"{own}.pt")


@pytest.mark.slow
def test_two_processes_train_one_network_and_the_first_writes(tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ebm_at.__file__).parent)}
    subprocess.run([sys.executable, *torchrun, __file__, tmp_path], env=env, check=True)
    (history, *ours), (other, *theirs) = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    assert history == other and all(map(torch.equal, ours, theirs))
    assert sorted(os.listdir(tmp_path / "0")) == ["best.pt", "last.pt"]
    assert os.listdir(tmp_path / "1") == []


if __name__ == "__main__":
    main(sys.argv[1])
