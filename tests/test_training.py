"""The loop: schedules, resume, reactions to overfitting, diverging losses, several processes."""

import copy
import dataclasses
import math

import pytest
import torch

import ebm_at

TINY = dict(width=8, batch_size=20, epochs=3, probe_size=20, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def data():
    """100 training images of `shapes`; validation and test cut down to 60."""
    found = ebm_at.load_data("shapes", limit=100)
    for split in ("val", "test"):
        setattr(found, f"x_{split}", getattr(found, f"x_{split}")[:60])
        setattr(found, f"y_{split}", getattr(found, f"y_{split}")[:60])
    return found


def rows(records):
    """History rows without the two columns that are measured in seconds."""
    timed = ("seconds", "probe_seconds")
    return [{k: v for k, v in r.items() if k not in timed} for r in records if r["kind"] == "epoch"]


def same(a, b):
    """Equality that also holds for nan."""
    return repr(a) == repr(b)


def test_schedules_at_their_corners():
    config = ebm_at.Config(lr=0.2)
    at = lambda kind, t: ebm_at.lr_at(dataclasses.replace(config, schedule=kind), t)  # noqa: E731
    assert at("triangular", 0) == 0
    assert at("triangular", 0.2) == pytest.approx(0.1)
    assert at("triangular", 0.4) == pytest.approx(0.2)
    assert at("triangular", 0.7) == pytest.approx(0.1)
    assert [at("piecewise", t) for t in (0.49, 0.5, 0.75)] == pytest.approx([0.2, 0.02, 0.002])
    assert at("cosine", 0) == pytest.approx(0.2) and at("cosine", 0.5) == pytest.approx(0.1)
    assert at("constant", 0.9) == 0.2


def test_eps_warms_up_linearly_and_stays():
    config = ebm_at.Config(eps=0.08, eps_warmup=2.0)
    assert [ebm_at.eps_at(config, t) for t in (0, 1, 2, 5)] == pytest.approx([0, 0.04, 0.08, 0.08])
    assert ebm_at.eps_at(dataclasses.replace(config, eps_warmup=0.0), 0) == 0.08


@pytest.mark.parametrize("method", list(ebm_at.METHODS))
def test_training_lowers_its_own_loss(data, method):
    """On one fixed batch every method's loss falls clearly within 15 steps."""
    config = ebm_at.recipe(method=method, eps=4 / 255, attack_steps=2, **TINY)
    trainer = ebm_at.Trainer(config, data, ebm_at.build_model(config, data))
    trainer.model.train()
    batch = torch.arange(20)
    losses = [
        trainer.step(batch, torch.Generator().manual_seed(0), 0.1)[0].item() for _ in range(15)
    ]
    assert losses[-1] < 0.9 * losses[0]


def test_step_is_sgd_on_the_written_loss(data):
    """One FGSM + DER step against plain autograd and the SGD formula, written out here."""
    config = ebm_at.recipe(der=True, beta=1.4, der_ramp=0.5, eps=8 / 255, eps_warmup=0.0, **TINY)
    model = ebm_at.build_model(config, data)
    plain = copy.deepcopy(model).train()
    trainer = ebm_at.Trainer(config, data, model)
    trainer.model.train()
    batch, at = torch.arange(20), 0.25
    loss, *tracked = trainer.step(batch, torch.Generator().manual_seed(0), at)

    x, y = data.x_train[:20].float() / 255, data.y_train[:20]
    probe = x.clone().requires_grad_(True)
    torch.nn.functional.cross_entropy(plain(probe), y).backward()  # with the batch's statistics
    plain.zero_grad()
    x_adv = (x + 8 / 255 * probe.grad.sign()).clamp(0, 1)
    clean, adv = plain(x), plain(x_adv)
    ce = lambda logits: torch.nn.functional.cross_entropy(logits, y, reduction="none")  # noqa: E731
    dx = adv.logsumexp(1) - clean.logsumexp(1)
    dxy = adv.gather(1, y[:, None])[:, 0] - clean.gather(1, y[:, None])[:, 0]
    expected = ce(adv).mean() + 0.7 * (dx**2 + dxy**2).sqrt().mean()  # half of the ramp: beta / 2
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # What the step tells for nothing (TRACKED) is what a separate computation finds.
    free = [adv.argmax(1) == y, ce(adv) < ce(clean), dx, dxy]
    for told, value in zip(tracked, free):
        assert told.item() == pytest.approx(value.float().mean().item(), abs=1e-5)
    lr = ebm_at.lr_at(config, at)
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        want = theirs.detach() - lr * (theirs.grad + config.weight_decay * theirs.detach())
        torch.testing.assert_close(mine.detach(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [dict(attack_bn="eval"), dict(method="trades")])
def test_tracked_energies_compare_one_network_with_itself(data, settings):
    """The attack may see running statistics where the loss sees the batch's: at eps 0 nothing moves."""
    config = ebm_at.recipe(**TINY | settings | dict(eps=1e-9, eps_warmup=0.0))
    trainer = ebm_at.Trainer(config, data, ebm_at.build_model(config, data))
    trainer.model.train()
    for i in range(3):  # the running statistics are far from the batch's
        *_, dx, dxy = trainer.step(torch.arange(20), torch.Generator().manual_seed(i), 0.3)
    assert abs(dx.item()) < 2e-2 and abs(dxy.item()) < 2e-2


def test_ema_is_a_weighted_mean_of_the_weights_so_far(data):
    """With ema .6 the first decays are 1/4, 2/5, 3/6, 4/7 and then .6, also BatchNorm's."""
    config = ebm_at.recipe(ema=0.6, **TINY)
    trainer = ebm_at.Trainer(config, data, ebm_at.build_model(config, data))
    trainer.model.train()
    states = [copy.deepcopy(trainer.model.state_dict())]  # the untrained ones, and after each step
    for i in range(6):
        at = i / trainer.steps / config.epochs
        trainer.step(torch.arange(20), torch.Generator().manual_seed(i), at)
        states.append(copy.deepcopy(trainer.model.state_dict()))
    decays = [1 / 4, 2 / 5, 3 / 6, 4 / 7, 0.6, 0.6]
    shares = [1.0] + [1 - d for d in decays]
    shares = [share * math.prod(decays[k:]) for k, share in enumerate(shares)]
    assert sum(shares) == pytest.approx(1)
    for name, kept in trainer.judged.state_dict().items():
        values = [state[name].double() for state in states]
        want = sum(share * value for share, value in zip(shares, values))
        want = want if kept.is_floating_point() else values[-1]
        torch.testing.assert_close(kept.double(), want, rtol=1e-5, atol=1e-6)


EXTRAS = [
    {},
    dict(method="pgd", attack_steps=2, ema=0.9, augment="crop-flip"),
    dict(method="rs-fgsm", der=True, awp=0.01, schedule="piecewise"),
    dict(method="n-fgsm", grad_align=0.2, norm="l2", eps=0.5),
]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_resume_equals_uninterrupted(data, tmp_path, extra, stop_after):
    """Bit for bit: history and weights, wherever the run was cut."""
    config = ebm_at.recipe(**TINY | extra)
    whole = ebm_at.build_model(config, data)
    wanted = rows(ebm_at.train(config, data, whole))

    run, got = ebm_at.train(config, data, folder=tmp_path), []
    for record in run if stop_after else ():
        got.append(record)
        if record["kind"] == "epoch" and record["epoch"] == stop_after:
            break
    if not stop_after:
        ebm_at.Trainer(config, data, ebm_at.build_model(config, data)).save(tmp_path)
    run.close()
    again = ebm_at.build_model(
        dataclasses.replace(config, seed=99), data
    )  # its weights must not matter
    checkpoint = ebm_at.load_checkpoint(tmp_path / "last.pt")
    got = got + list(ebm_at.train(config, data, again, folder=tmp_path, resume=checkpoint))
    assert same(rows(got), wanted)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_resume_of_a_run_beyond_its_epochs_ends_at_once(data, tmp_path):
    """Fewer epochs than are done already must not run on with a negative learning rate."""
    config = ebm_at.recipe(**TINY)
    list(ebm_at.train(config, data, folder=tmp_path))
    checkpoint = ebm_at.load_checkpoint(tmp_path / "last.pt")
    checkpoint["training"]["finished"] = False
    shorter = dataclasses.replace(config, epochs=2, eps_warmup=0.0)
    assert list(ebm_at.train(shorter, data, resume=checkpoint)) == []


def test_a_finished_run_is_not_silently_resumed_for_longer(data, tmp_path):
    config = ebm_at.recipe(**TINY)
    list(ebm_at.train(config, data, folder=tmp_path))
    checkpoint = ebm_at.load_checkpoint(tmp_path / "last.pt")
    longer = dataclasses.replace(config, epochs=4)
    with pytest.raises(ebm_at.BadInput, match="ended at epoch 3: start a new one"):
        list(ebm_at.train(longer, data, resume=checkpoint))


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_train_hands_the_measured_model_over_in_eval_mode(data, tmp_path, ema):
    """Its logits are those of last.pt, and looking at them moves no BatchNorm statistics."""
    config = ebm_at.recipe(ema=ema, **TINY)
    model = ebm_at.build_model(config, data)
    list(ebm_at.train(config, data, model, folder=tmp_path))
    x = data.x_test[:20].float() / 255
    before = copy.deepcopy(model.state_dict())
    logits = model(x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    torch.testing.assert_close(logits, ebm_at.load_model(tmp_path / "last.pt")[0](x))


def test_float_images_train_and_measure_as_their_uint8_twins_do(data):
    """Divided by 255 once more they would be black, and no error would say so."""
    config = ebm_at.recipe(**TINY)
    floats = {k: getattr(data, k).float() / 255 for k in ("x_train", "x_val", "x_test")}
    twin = dataclasses.replace(data, **floats)
    models = [ebm_at.build_model(config, data) for _ in range(2)]
    histories = [rows(ebm_at.train(config, d, m)) for d, m in zip((data, twin), models)]
    assert same(*histories)


def test_probe_sees_all_classes_of_sorted_data(data):
    """Folders come class by class: a probe of the first rows would see one class only."""
    order = data.y_val.argsort()
    sorted_data = dataclasses.replace(data, x_val=data.x_val[order], y_val=data.y_val[order])
    seen = {}
    config = ebm_at.recipe(**TINY)
    trainer = ebm_at.Trainer(config, sorted_data, ebm_at.build_model(config, data))
    measure = ebm_at.evaluate
    ebm_at.evaluate = lambda model, x, y, *rest: seen.update(y=y) or measure(model, x, y, *rest)
    try:
        trainer.probing = 0.0
        trainer.probe("val", 20)
    finally:
        ebm_at.evaluate = measure
    assert len(seen["y"]) == 20 and seen["y"].unique().numel() == 10


def test_seed_decides_everything(data):
    runs = [rows(ebm_at.train(ebm_at.recipe(seed=s, **TINY), data)) for s in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_best_is_chosen_on_validation_and_saved(data, tmp_path):
    config = ebm_at.recipe(**TINY | dict(epochs=5))
    history = rows(ebm_at.train(config, data, folder=tmp_path))
    model, checkpoint = ebm_at.load_model(tmp_path / "best.pt")
    best = max(history, key=lambda r: r["val_pgd_acc"])  # max takes the first of equals, as we do
    assert checkpoint["epoch"] == best["epoch"]
    chosen = ebm_at.evenly(20, len(data.y_val))  # the images that the epochs were judged by
    found = ebm_at.evaluate(model, data.x_val[chosen], data.y_val[chosen], config.eps)
    assert found["pgd_acc"] == pytest.approx(best["val_pgd_acc"])


# ------------------------------------------------------------------------ the monitor and reactions


def found(fgsm, pgd, delta=0.0):
    return {"n": 400, "fgsm_acc": fgsm, "pgd_acc": pgd, "delta_energy_pgd": delta}


def test_monitor_calls_collapse_catastrophic_and_names_the_numbers():
    monitor = ebm_at.OverfittingMonitor()
    assert not monitor.catastrophic(found(0.28, 0.20), "epoch 4")
    reason = monitor.catastrophic(found(0.65, 0.02, 3.1), "epoch 5")
    for part in ("epoch 5", "2.0%", "20.0%", "65.0%", "+3.10"):
        assert part in reason


def test_monitor_calls_a_model_that_never_was_robust_but_masters_its_own_attack():
    """At a large eps the collapse may come before the first measurement."""
    monitor = ebm_at.OverfittingMonitor()
    assert not monitor.catastrophic(found(0.45, 0.01), "epoch 1")
    assert "epoch 2" in monitor.catastrophic(found(0.7, 0.01), "epoch 2")


def test_monitor_believes_the_training_attack_where_fgsm_in_eval_mode_misses_the_collapse():
    monitor = ebm_at.OverfittingMonitor()
    assert not monitor.catastrophic(found(0.25, 0.20), "epoch 4", train_adv_acc=0.3)
    assert "62.0%" in monitor.catastrophic(found(0.08, 0.03), "epoch 5", train_adv_acc=0.62)


@pytest.mark.parametrize(
    "history",
    [
        [(0.06, 0.05), (0.17, 0.12), (0.22, 0.17)],  # the first epochs of a healthy run
        [(0.25, 0.19), (0.28, 0.20), (0.45, 0.22)],  # FGSM runs ahead, PGD holds
        [(0.25, 0.20), (0.12, 0.09), (0.24, 0.19)],  # a bad epoch for both
        [(0.10, 0.10), (0.10, 0.0), (0.09, 0.0)],  # an untrained model that answers one class
        [(0.15, 0.0), (0.16, 0.0), (0.2, 0.0)],  # PGD accuracy that never was cannot fall
    ],
)
def test_monitor_keeps_quiet_on_healthy_runs(history):
    monitor = ebm_at.OverfittingMonitor()
    assert not any(monitor.catastrophic(found(*pair), "epoch") for pair in history)


def test_monitor_robust_overfitting_needs_decay_and_rising_training_accuracy():
    def verdict(pgd, train):
        monitor = ebm_at.OverfittingMonitor()
        return [
            monitor.robust(found(0.5, p, 0.2), t, i + 1) for i, (p, t) in enumerate(zip(pgd, train))
        ][-1]

    decaying, rising = [0.3, 0.3, 0.3, 0.2, 0.2, 0.2], [0.3, 0.35, 0.4, 0.6, 0.8, 0.9]
    reason = verdict(decaying, rising)
    assert "30.0%" in reason and "20.0%" in reason and "around epoch 3" in reason
    assert not verdict(decaying, [0.3] * 6)
    assert not verdict([0.3] * 6, rising)
    assert not verdict([0.3, 0.3, 0.3, 0.3, 0.25, 0.3], rising)  # one noisy epoch is forgiven


class Collapsing(ebm_at.Trainer):
    """A trainer whose validation measurements collapse at `strike`, until DER is on."""

    strike = 2

    def probe(self, split, size):
        measured = super().probe(split, size)
        if split == "val":
            bad = self.epoch >= self.strike and not self.config.der
            measured |= found(0.6, 0.0, 3.0) if bad else found(0.3, 0.2 + 0.001 * self.epoch)
        return measured


def test_verdict_says_when_nothing_was_learnt(data):
    """No accuracy to lose is no overfitting, but a green "healthy" alone would mislead."""
    config = ebm_at.recipe(**TINY | dict(lr=1e-7))
    trainer = ebm_at.Trainer(config, data, ebm_at.build_model(config, data))
    list(trainer.run())
    verdict, reason = trainer.verdict()
    assert verdict == "at chance" and "No better than one answer" in reason


def test_a_run_that_an_alarm_ends_within_its_first_epoch_has_a_verdict(data):
    config = ebm_at.recipe(on_overfit="stop", **TINY)
    trainer = ebm_at.Trainer(config, data, ebm_at.build_model(config, data))
    alarm = {"verdict": "CO", "reason": "it fell", "action": "stop", "der": False}
    trainer.alarms.append(alarm)
    assert trainer.verdict() == ("CO", "it fell")


def test_no_alarm_while_eps_still_grows(data):
    """Probes use the full eps: until the attack has reached it, low accuracy is no collapse."""
    config = ebm_at.recipe(on_overfit="stop", eps_warmup=2.0, **TINY | dict(epochs=4))
    trainer = Collapsing(config, data, ebm_at.build_model(config, data))
    trainer.strike = 0
    alarms = [r for r in trainer.run() if r["kind"] == "alarm"]
    assert [a["epoch"] for a in alarms] == [2]


@pytest.mark.parametrize(
    "reaction, epochs, back, der", [("continue", 4, 1, False), ("stop", 2, 1, False),
                                    ("rollback", 2, 1, False), ("der", 4, 1, True)],
)  # fmt: skip
def test_reactions(data, tmp_path, reaction, epochs, back, der):
    config = ebm_at.recipe(on_overfit=reaction, **TINY | dict(epochs=4))
    trainer = Collapsing(config, data, ebm_at.build_model(config, data))
    states, records = {}, []
    for record in trainer.run(tmp_path):
        records.append(record)
        if record["kind"] == "epoch":
            states[record["epoch"]] = copy.deepcopy(trainer.model.state_dict())
    alarms = [r for r in records if r["kind"] == "alarm"]
    assert len(alarms) == 1, "only the first alarm of a kind is told"
    assert (alarms[0]["verdict"], alarms[0]["epoch"], alarms[0]["action"]) == ("CO", 2, reaction)
    assert alarms[0]["back_to_epoch"] == back
    assert len(trainer.history) == epochs and trainer.config.der is der
    kept = all(torch.equal(states[2][k], states[1][k]) for k in states[1])
    assert kept == (reaction in ("rollback", "der")), (
        "the best state comes back, only when asked to"
    )
    assert trainer.verdict()[0] == ("healthy" if reaction == "der" else "CO")
    assert ebm_at.load_checkpoint(tmp_path / "last.pt")["training"]["finished"]
    assert not config.der, "the caller's config is not changed"


def test_alarm_inside_an_epoch_stops_there(data, tmp_path):
    class CollapsingWithin(ebm_at.Trainer):
        def probe(self, split, size):  # the checks inside an epoch look at 200 images at most
            measured = super().probe(split, size)
            bad = self.epoch == 1 and size == 200
            return measured | (found(0.6, 0.0, 3.0) if bad else found(0.3, 0.2))

    config = ebm_at.recipe(on_overfit="stop", probe_every=3, **TINY | dict(probe_size=201))
    trainer = CollapsingWithin(config, data, ebm_at.build_model(config, data))
    records = list(trainer.run(tmp_path))
    assert records[-1]["kind"] == "alarm" and records[-1]["when"] == "epoch 2, step 3"
    assert len(trainer.history) == 1 and trainer.verdict()[0] == "CO"


def test_rescue_restarts_the_schedule_and_gives_up_when_der_fails_too(data, tmp_path):
    """Healthy, collapse, healthy with DER, collapse again: the best state comes back, and stop."""

    class CollapsingTwice(ebm_at.Trainer):
        def probe(self, split, size):
            bad = self.epoch in (2, 4)
            return super().probe(split, size) | (found(0.6, 0.0) if bad else found(0.3, 0.2))

    config = ebm_at.recipe(on_overfit="der", **TINY | dict(epochs=6))
    trainer = CollapsingTwice(config, data, ebm_at.build_model(config, data))
    records = list(trainer.run(tmp_path))
    actions = [r["action"] for r in records if r["kind"] == "alarm"]
    assert actions == ["der", "rollback"] and len(trainer.history) == 4
    # 5 steps an epoch; the last step of epoch 3 lies at 4/5 of the first of 4 epochs that are left
    progress = (4 / 5) / 4
    assert trainer.history[2]["lr"] == pytest.approx(config.lr * progress / 0.4)
    assert trainer.verdict()[0] == "CO"
    best = ebm_at.load_checkpoint(tmp_path / "best.pt")["model"]
    assert all(torch.equal(v, best[k]) for k, v in trainer.model.state_dict().items())


def test_rescue_survives_a_resume(data, tmp_path):
    """DER switched on by the alarm stays on after a restart, and the numbers stay the same."""
    config = ebm_at.recipe(on_overfit="der", **TINY | dict(epochs=4))
    wanted = rows(Collapsing(config, data, ebm_at.build_model(config, data)).run())
    got = []
    for record in Collapsing(config, data, ebm_at.build_model(config, data)).run(tmp_path):
        got.append(record)
        if record["kind"] == "epoch" and record["epoch"] == 3:
            break
    saved = ebm_at.load_checkpoint(tmp_path / "last.pt")
    got += list(Collapsing(config, data, ebm_at.build_model(config, data), saved).run(tmp_path))
    assert same(rows(got), wanted)


# -------------------------------------------------------------------------------- things that go wrong


def test_a_stopped_run_can_be_taken_up_to_be_measured(data, tmp_path):
    config = ebm_at.recipe(on_overfit="stop", **TINY | dict(epochs=4))
    list(Collapsing(config, data, ebm_at.build_model(config, data)).run(tmp_path))
    saved = ebm_at.load_checkpoint(tmp_path / "last.pt")
    again = Collapsing(config, data, ebm_at.build_model(config, data), saved)
    assert list(again.run()) == [] and again.verdict()[0] == "CO"


def test_a_resume_on_other_images_is_refused(data, tmp_path):
    config = ebm_at.recipe(**TINY)
    ebm_at.Trainer(config, data, ebm_at.build_model(config, data)).save(tmp_path)
    saved = ebm_at.load_checkpoint(tmp_path / "last.pt")
    other = dataclasses.replace(data, x_train=data.x_train.flip(0))
    with pytest.raises(ebm_at.RunError, match="training images are not those"):
        ebm_at.Trainer(config, other, ebm_at.build_model(config, other), saved)


@pytest.mark.parametrize(
    "path, value",
    [("epoch", "1"), ("history", [{}]), ("best/accuracy", None), ("schedule_start", 5),
     ("now/optimizer/param_groups", 3), ("now/optimizer/state", {0: {"momentum_buffer": "x"}}),
     ("best/optimizer/state", {0: {"momentum_buffer": torch.zeros(2)}}), ("monitor/best", [1]),
     ("monitor/recent", ["x"]), ("alarms", [{"verdict": 1}])],
)  # fmt: skip
def test_odd_values_in_a_training_state_are_refused(data, tmp_path, path, value):
    config = ebm_at.recipe(**TINY)
    trainer = ebm_at.Trainer(config, data, ebm_at.build_model(config, data))
    trainer.save(tmp_path)
    saved = ebm_at.load_checkpoint(tmp_path / "last.pt")
    part = saved["training"]
    *way, last = path.split("/")
    for name in way:
        part = part[name]
    part[last] = value
    with pytest.raises(ebm_at.RunError, match="does not fit this run"):
        ebm_at.Trainer(config, data, trainer.model, saved)


def test_processes_that_nobody_started_are_a_run_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ebm_at.RunError, match="start with torchrun, or unset WORLD_SIZE"):
        ebm_at.start_processes("cpu")


def test_diverging_loss_names_the_step_and_keeps_the_last_good_checkpoint(data, tmp_path):
    config = ebm_at.recipe(**TINY)
    trainer = ebm_at.Trainer(config, data, ebm_at.build_model(config, data))
    step = trainer.step

    def broken(batch, generator, at):
        found = step(batch, generator, at)
        return found * math.nan if at >= (1 + 2 / 5) / 3 - 1e-9 else found

    trainer.step = broken
    with pytest.raises(ebm_at.RunError, match="nan at step 3 of epoch 2"):
        list(trainer.run(tmp_path))
    checkpoint = ebm_at.load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["epoch"] == 1
    assert all(t.isfinite().all() for t in checkpoint["model"].values())


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(method="fsgm"), "did you mean 'fgsm'"),
        (dict(model="preactresnet"), "did you mean 'preactresnet18'"),
        (dict(eps=8.0), "8/255"),
        (dict(eps=-1.0), "above 0"),
        (dict(eps=math.nan), "above 0"),
        (dict(epochs=0), "epochs must be at least 1"),
        (dict(epochs=-3), "epochs must be at least 1"),
        (dict(lr=0.0), "lr must be positive"),
        (dict(lr=math.nan), "lr must be positive"),
        (dict(beta=-1.0), "beta must not be negative"),
        (dict(der_from=1.0), "der_from"),
        (dict(epoch=5), "did you mean 'epochs'"),
        (dict(schedule="cosin"), "did you mean 'cosine'"),
        (dict(on_overfit="panic"), "unknown on_overfit"),
        (dict(method="none", der=True), "'none' makes no adversarial images"),
        (dict(momentum=1.0), "momentum"),
        (dict(seed=2**32), "seed must be below"),
        (dict(eps_warmup=3.0, epochs=3), "never ends"),
        (dict(compile=True, grad_align=0.2), "second derivatives"),
    ],
)
def test_recipe_refuses(settings, words):
    with pytest.raises(ebm_at.BadInput, match=words):
        ebm_at.recipe(**settings)


def test_trainer_refuses_a_batch_larger_than_the_data(data):
    config = ebm_at.recipe(**TINY | dict(batch_size=101))
    with pytest.raises(ebm_at.BadInput, match="batch_size 101 exceeds the 100"):
        ebm_at.Trainer(config, data, ebm_at.build_model(config, data))


def test_absent_device_is_a_run_error():
    with pytest.raises(ebm_at.RunError, match="cuda:7"):
        ebm_at.pick_device("cuda:7")


def test_recipes_follow_their_sources():
    fast, rice = ebm_at.recipe("cifar10", "rs-fgsm"), ebm_at.recipe("cifar10", "pgd")
    assert (fast.epochs, fast.lr, fast.schedule) == (30, 0.2, "triangular")
    assert (rice.epochs, rice.lr, rice.schedule) == (200, 0.1, "piecewise")
    mart = ebm_at.recipe("cifar10", "mart")
    assert (mart.lr, mart.weight_decay, mart.method_beta) == (0.01, 3.5e-3, 5.0)
    assert ebm_at.recipe("cifar10", "fgsm", grad_align=0.2).lr == 0.3
    for name in ("mnist", "svhn", "my/digits.npz"):
        assert ebm_at.recipe(name).augment == "crop", "a mirrored digit is another sign"
    assert ebm_at.recipe("cifar10").augment == "crop-flip"
    assert fast.eps == pytest.approx(8 / 255)
    svhn = ebm_at.recipe("svhn", "n-fgsm")
    assert (svhn.lr, svhn.eps_warmup) == (0.05, 5.0)
    multi = ebm_at.recipe("svhn", "pgd")
    assert (multi.lr, multi.attack_step) == (0.01, pytest.approx(1 / 255))
    assert ebm_at.recipe("svhn", "fgsm", grad_align=0.2).lr == 0.05
    trades = ebm_at.recipe("cifar10", "trades", awp=0.005)
    assert (trades.epochs, trades.weight_decay, trades.awp_warmup) == (76, 2e-4, 10)
    rates = [ebm_at.lr_at(trades, epoch / 76) for epoch in (74, 75)]
    assert rates == pytest.approx([0.1, 0.01])
    wide = ebm_at.recipe("cifar10", "mart", model="wrn-34-10")
    assert (wide.lr, wide.weight_decay, wide.epochs) == (0.1, 7e-4, 120)
    assert ebm_at.recipe("cifar10", "pgd", norm="l2").attack_step == pytest.approx(15 / 255)
    assert ebm_at.lr_at(fast, 0.5) == pytest.approx(0.2), "the triangle peaks in the middle"
    late = ebm_at.recipe("cifar10", "pgd", der=True)
    assert [ebm_at.beta_at(late, t) for t in (0.79, 0.8)] == [0.0, 6.0] and late.gamma == 0.2
    for dataset in ("shapes", "cifar10"):  # an l_2 ball of 8/255 holds next to nothing
        assert ebm_at.recipe(dataset, "pgd", norm="l2").eps == pytest.approx(128 / 255)
        assert ebm_at.recipe(dataset, "pgd", norm="l2", eps=1.0).eps == 1.0
