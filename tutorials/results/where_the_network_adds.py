"""What does the classifier add to its generated images? Every start with and without the walk.

    python tutorials/results/where_the_network_adds.py RUN/best.pt NAME=JUDGE/last.pt ... > all.csv

One row per way and seed. Zero steps is the control: what the start does alone; with one candidate
the network is not even asked which start it likes. "other class" starts in a picture of the next
class, which cannot know the answer. Each judge measures the very same images; nearest_px is the
median distance to the nearest training image. The judges must not have made the images.
"""

import csv
import sys
import time
from pathlib import Path

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ebm_at  # noqa: E402

GUIDES = {"": ebm_at.energy_xy, ", class guide": ebm_at.cross_entropy}


def make(model, pcas, energies, y, init, candidates, stop, quantile, seed, **walk):
    """Images (N, C, H, W) of the classes y, and the record of the walk."""
    if init != "other class":
        return ebm_at.generate(model, pcas, energies, y, init=init, candidates=candidates,
                               stop=stop, quantile=quantile, seed=seed, **walk)  # fmt: skip
    other = (y + 1) % len(pcas)
    x, _ = ebm_at.generate(model, pcas, energies, other, candidates=1, seed=seed, steps=0)
    draw, targets = torch.Generator(y.device).manual_seed(seed), torch.empty(len(y))
    for k in range(len(pcas)):
        of_class = y == k
        targets[of_class] = ebm_at.stop_targets(energies[k], int(of_class.sum()), stop, quantile,
                                                draw)  # fmt: skip
    return ebm_at.sgld(model, x, y, targets, generator=draw, **walk)


def judged(network, x8, y, real):
    """Every metric of uint8 images by one judge, whose features of real test images are `real`."""
    features, p = ebm_at.judge_images(network, x8)
    precision, recall = ebm_at.precision_recall(real, features)
    return {
        "fd": ebm_at.frechet_distance(features, real), "is": ebm_at.inception_score(p)[0],
        "precision": precision, "recall": recall, "agreement": ebm_at.class_agreement(p, y),
    }  # fmt: skip


def main(
    checkpoint: str, judges: list[str], dataset: str = "", per_class: int = 100, seeds: int = 3,
    starts: str = "local-pca 50,local-pca 10,gaussian 50,mean 50,noise 50,other class 50",
    stop: str = "sampled", quantile: float = 0.5, threads: int = 1,
):  # fmt: skip
    torch.set_num_threads(threads)
    model, saved = ebm_at.load_model(checkpoint)
    given = {k: saved["config"][k] for k in ("data_dir", "limit", "val_fraction")}
    data = ebm_at.load_data(dataset or saved["config"]["dataset"], **given)
    x, y, classes = data.x_train, data.y_train, len(data.classes)
    energies = ebm_at.class_energies(model, x, y, classes)
    networks = {name: ebm_at.load_model(path)[0] for name, path in (j.split("=") for j in judges)}
    real = {name: ebm_at.judge_images(net, data.x_test) for name, net in networks.items()}
    for name, (_, p) in real.items():
        right = ebm_at.class_agreement(p, data.y_test)
        print(f"judge {name}: {right:.1%} right on real test images", file=sys.stderr)
    train = ebm_at.as_pixels(x).flatten(1)
    labels = torch.arange(classes).repeat_interleave(per_class)
    ways = {  # name: candidates and settings of the walk
        "zero steps, one candidate": (1, {"steps": 0}),
        "zero steps": (8, {"steps": 0}),
        **{f"walk{name}": (8, {"guide": guide}) for name, guide in GUIDES.items()},
        "60 steps": (8, {"stop": "fixed"}),
    }
    writer = None
    for start in starts.split(","):
        init, components = start.rsplit(" ", 1)
        pcas = [ebm_at.fit_pca(x[y == k], int(components)) for k in range(classes)]
        for way, (candidates, walk) in ways.items():
            if way == "zero steps" and init in ("mean", "other class"):
                continue  # there is nothing to choose from
            for seed in range(seeds):
                began, options = time.perf_counter(), {"stop": stop, "quantile": quantile} | walk
                made, record = make(model, pcas, energies, labels, init, candidates, seed=seed,
                                    **options)  # fmt: skip
                row = {"way": f"{start}, {way}", "seed": seed, "n": len(labels),
                       "steps": record["steps"].float().mean().item(),
                       "no_step": int((record["steps"] == 0).sum()),
                       "seconds": time.perf_counter() - began}  # fmt: skip
                x8 = (made * 255).round().to(torch.uint8)
                near, _ = ebm_at.nearest_distance(ebm_at.as_pixels(x8).flatten(1), train)
                row["nearest_px"] = near.median().item()
                for name, network in networks.items():
                    told = judged(network, x8, labels, real[name][0])
                    row |= {f"{name}_{k}": v for k, v in told.items()}
                if writer is None:
                    writer = csv.DictWriter(sys.stdout, row, lineterminator="\n")
                    writer.writeheader()
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v
                                 for k, v in row.items()})  # fmt: skip
                sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
