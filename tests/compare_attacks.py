"""Are our attacks as strong as those of a public library, and how fast are they beside it?

What  Two comparisons with torchattacks on the same model, images and budgets, in one process, taking
      turns. (a) robust_accuracy's standard suite against its APGD(ce), APGDT and Square, run one
      after the other on what still stands, as its AutoAttack does. (b) PGD-20 against its PGD.
Why   A robust accuracy is an upper bound: a weak attack flatters the model. auto-attack, the third
      implementation, is not on the package index; torchattacks' three are ports of it.
How   pip install --no-deps torchattacks==3.5.1 && pip install requests scipy tqdm
      python tests/compare_attacks.py RUN/best.pt --eps 8/255 --json result.json
      The data are the run's test images, or an .npz by --data.
Read  robust: accuracy judged in fp32 on the final images, for both sides alike. ratio: our seconds
      over theirs, median over the repeats; below 1 ours is faster. Both get the same fp32 weights,
      laid out channels-last; ours searches in bf16 where the hardware has it (--precision). Peak
      memory: of a process that does nothing but PGD, over what it held before; on a GPU, torch's.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli  # noqa: E402
import ebm_at  # noqa: E402

ebm_at.import_torchvision()  # torchattacks imports torchvision, which may not fit a CPU torch
import torchattacks  # noqa: E402


def their_suite(model, x, y, eps, queries, batch_size):
    """torchattacks' three on one batch after another; returns x_adv (N, C, H, W)."""
    parts, classes = [], ebm_at.exact_logits(model, x[:1]).shape[1]
    for part, labels in zip(x.split(batch_size), y.split(batch_size)):
        attacks = [
            torchattacks.APGD(model, eps=eps, steps=100, loss="ce"),
            torchattacks.APGDT(model, eps=eps, steps=100, n_classes=classes),
            torchattacks.Square(model, eps=eps, n_queries=queries),
        ]
        parts.append(torchattacks.MultiAttack(attacks)(part, labels))
    return torch.cat(parts)


def our_suite(model, x, y, eps, queries, batch_size, precision):
    options = dict(queries=queries, batch_size=batch_size, precision=precision)
    return ebm_at.robust_accuracy(model, x, y, eps, "standard", **options)["x_adv"]


def their_pgd(model, x, y, eps, batch_size):
    attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=20)
    return torch.cat([attack(*part) for part in zip(x.split(batch_size), y.split(batch_size))])


def our_pgd(model, x, y, eps, batch_size, precision):
    generator = torch.Generator(x.device).manual_seed(0)
    with ebm_at.autocast(x.device, ebm_at.pick_precision(precision, x.device)):
        parts = zip(x.split(batch_size), y.split(batch_size))
        return torch.cat([ebm_at.pgd(model, *p, eps, 20, generator=generator) for p in parts])


def timed(attack, model, x, y):
    """(robust accuracy judged in fp32, seconds) of one call."""
    began = time.perf_counter()
    x_adv = attack()
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return (ebm_at.exact_logits(model, x_adv).argmax(1) == y).float().mean().item(), seconds


def peak_memory(side, checkpoint, shape, batch_size, precision):
    """MiB that PGD needs on top of model and images, in a process of its own."""
    command = [sys.executable, __file__, str(checkpoint), "--child", side, "--precision", precision,
               "--batch-size", str(batch_size), "--shape", ",".join(map(str, shape))]  # fmt: skip
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def child(side, model, shape, batch_size, precision):
    """Prints the memory that `side` adds; the content of the images does not matter."""
    device = next(model.parameters()).device
    x = torch.rand(batch_size, *shape, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.zeros(batch_size, dtype=torch.int64, device=device)
    attack = {"ours": our_pgd, "theirs": their_pgd}[side]
    more = [precision] if side == "ours" else []
    if x.is_cuda:
        before, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    else:  # importing took memory too: Linux forgets the peak so far when told to
        Path("/proc/self/clear_refs").write_text("5")
        before, peak = (lambda: resident("VmRSS")), (lambda: resident("VmHWM"))
    before = before()
    attack(model, x, y, 8 / 255, batch_size, *more)
    print((peak() - before) / 2**20)


def resident(key):
    """Bytes of memory that this process holds (VmRSS) or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main(checkpoint: Path, eps: str = "8/255", n: int = 1000, queries: int = 1000,
         batch_size: int = 250, repeats: int = 1, pgd_repeats: int = 5, precision: str = "auto",
         data: Annotated[Optional[Path], typer.Option(envvar="EBM_AT_CIFAR10")] = None,
         out: Annotated[Optional[Path], typer.Option("--json")] = None,
         child_of: Annotated[str, typer.Option("--child", hidden=True)] = "",
         shape: Annotated[str, typer.Option(hidden=True)] = ""):  # fmt: skip
    """Compares the standard suite and PGD-20 with torchattacks on one of our checkpoints."""
    device = ebm_at.pick_device()
    model, found = ebm_at.load_model(checkpoint, device)
    if child_of:
        return child(child_of, model, [int(s) for s in shape.split(",")], batch_size, precision)
    config, size = found["config"], cli.parse_eps(eps)
    name = config["dataset"]
    if name != "shapes" and not os.path.exists(name):
        name = str(data)
    test = ebm_at.load_data(name, config["data_dir"]).to(device)
    x, y = test.x_test[:n].float() / 255, test.y_test[:n]
    sides = {
        "suite": (lambda: their_suite(model, x, y, size, queries, batch_size),
                  lambda: our_suite(model, x, y, size, queries, batch_size, precision), repeats),
        "PGD-20": (lambda: their_pgd(model, x, y, size, batch_size),
                   lambda: our_pgd(model, x, y, size, batch_size, precision), pgd_repeats),
    }  # fmt: skip
    natural = timed(lambda: x, model, x, y)[0]
    report = {"command": " ".join(["python", *sys.argv]), "n": n, "eps": size, "queries": queries,
              "batch_size": batch_size, "natural": natural, "data": Path(name).name,
              "device": cli.device_name(device), "threads": torch.get_num_threads(),
              "search": str(ebm_at.pick_precision(precision, device)), "torch": torch.__version__,
              "torchattacks": torchattacks.__version__}  # fmt: skip
    table = Table("", "robust theirs", "ours", "s theirs", "s ours", "ratio",
                  title=f"{checkpoint}, {n} images, eps {eps}, natural {natural:.1%}")  # fmt: skip
    their_pgd(model, x[:batch_size], y[:batch_size], size, batch_size)  # warm-up
    our_pgd(model, x[:batch_size], y[:batch_size], size, batch_size, precision)
    for what, (theirs, ours, times) in sides.items():
        pairs = [(timed(theirs, model, x, y), timed(ours, model, x, y)) for _ in range(times)]
        (accuracy, _), (our_accuracy, _) = pairs[0]
        seconds = [statistics.median(pair[i][1] for pair in pairs) for i in (0, 1)]
        ratio = statistics.median(b[1] / a[1] for a, b in pairs)
        report[what] = {"theirs": accuracy, "ours": our_accuracy, "seconds_theirs": seconds[0],
                        "seconds_ours": seconds[1], "ratio": ratio, "pairs": times}  # fmt: skip
        table.add_row(what, f"{accuracy:.2%}", f"{our_accuracy:.2%}", f"{seconds[0]:.1f}",
                      f"{seconds[1]:.1f}", f"{ratio:.2f}")  # fmt: skip
    memory = [peak_memory(side, checkpoint, x.shape[1:], batch_size, precision)
              for side in ("theirs", "ours")]  # fmt: skip
    report["PGD-20"] |= {"MiB_theirs": memory[0], "MiB_ours": memory[1]}
    Console(highlight=False, soft_wrap=True).print(
        table, f"PGD-20, peak memory: theirs {memory[0]:.0f} MiB, ours {memory[1]:.0f} MiB;"
        f" {report['device']}, {report['threads']} threads, ours searches in {report['search']}",
    )  # fmt: skip
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
