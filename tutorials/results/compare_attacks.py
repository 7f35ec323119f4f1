"""Are our attacks as strong as a public library's, and how fast are they beside it?

On one model, images and budgets, in turn: the suite "standard" against torchattacks' APGD(ce),
APGDT and Square, run on what still stands, as its AutoAttack does; and PGD-20 against its PGD. A
robust accuracy is an upper bound: a weak attack flatters the model.

    pip install --no-deps torchattacks==3.5.1 && pip install requests scipy tqdm
    [EBM_AT_CIFAR10=cifar10.npz] python tutorials/results/compare_attacks.py RUN/best.pt --eps 8/255

Robust accuracy is judged by us in fp32, for both alike. Ratio: our seconds over theirs, the median
over the repeats; below 1 ours is faster.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cli  # noqa: E402
import ebm_at  # noqa: E402

ebm_at.import_torchvision()  # torchattacks imports torchvision, which may not fit a CPU torch
import torchattacks as theirs  # noqa: E402


def main(checkpoint: Path, eps: str = "8/255", n: int = 1000, queries: int = 1000,
         batch_size: int = 250, repeats: int = 1, pgd_repeats: int = 5):  # fmt: skip
    """Prints the comparison as JSON."""
    model, found = ebm_at.load_model(checkpoint, device := ebm_at.pick_device())
    config, size = found["config"], cli.parse_eps(eps)
    name = "shapes" if config["dataset"] == "shapes" else os.environ.get("EBM_AT_CIFAR10")
    data = ebm_at.load_data(name or config["dataset"], config["data_dir"]).to(device)
    x, y = ebm_at.as_pixels(data.x_test[:n]), data.y_test[:n]

    def timed(attack):
        """(robust accuracy, seconds), judging included: it waits for a GPU."""
        began = time.perf_counter()
        parts = zip(x.split(batch_size), y.split(batch_size))
        logits = ebm_at.exact_logits(model, torch.cat([attack(*part) for part in parts]))
        return (logits.argmax(1) == y).double().mean().item(), time.perf_counter() - began

    suite = [theirs.APGD(model, eps=size, steps=100, loss="ce"),
             theirs.APGDT(model, eps=size, steps=100, n_classes=len(data.classes)),
             theirs.Square(model, eps=size, n_queries=queries)]  # fmt: skip
    pgd = theirs.PGD(model, eps=size, alpha=size / 4, steps=20)
    sides = {
        "standard": (repeats, theirs.MultiAttack(suite), lambda x, y: ebm_at.robust_accuracy(
            model, x, y, size, "standard", queries=queries)["x_adv"]),
        "PGD-20": (pgd_repeats, pgd, lambda x, y: ebm_at.pgd(model, x, y, size, 20)),
    }  # fmt: skip
    report = {"command": " ".join(sys.argv), "natural": timed(lambda x, _: x)[0],
              "device": cli.device_name(device), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "torchattacks": theirs.__version__}  # fmt: skip
    for what, (times, *both) in sides.items():
        runs = [[timed(attack) for attack in both] for _ in range(times)]
        seconds = [statistics.median(run[i][1] for run in runs) for i in (0, 1)]
        report[what] = {"robust, theirs and ours": [accuracy for accuracy, _ in runs[0]],
                        "seconds": seconds, "pairs": times,
                        "ratio": statistics.median(b[1] / a[1] for a, b in runs)}  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    typer.run(main)
