"""ResNet on CIFAR-10 for a few epochs: ConvShort, the classical network without normalization, and batch norm.

    python benchmarks/cifar10_first_epochs.py --data=DIR --data-name="CIFAR-10 (JPEG copy)" --out=results

Trains the three with the same settings, one after another, in runs/NAME/<network>; stopped, it goes on where it was.
Writes OUT/NAME.jsonl (one line per network: settings, versions, device, every epoch), OUT/NAME.md and OUT/NAME.png.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from typing import Any

from absl import logging
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nfjax import config as configs
from nfjax.runs import metrics
from nfjax.training import loop as train

# name -> (residual, norm, colour): Okabe and Ito's colour-blind-safe palette.
NETWORKS = {
    "ConvShort": ("convshort", None, "#0072B2"),
    "classical, no norm": ("identity", None, "#D55E00"),
    "BatchNorm": ("identity", "batch", "#009E73"),
}


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one network (or finishes its run) and returns what it measured."""
    config = configs.cifar()
    config.model.residual, config.model.norm, _ = NETWORKS[name]
    config.model.depth, config.model.width, config.model.dtype = arguments.depth, arguments.width, arguments.dtype
    config.epochs, config.data.dir = arguments.epochs, arguments.data
    config.augment.rand_operations = 0
    workdir = pathlib.Path("runs") / arguments.name / name.replace(", ", "_").replace(" ", "_")
    diverged = None
    try:
        train.train(config, str(workdir))
    except train.TrainingDivergedError as error:
        diverged = str(error)
        print(f"{name} diverged: {error}")
    settings = json.loads((workdir / "config.json").read_text())
    settings["data"]["dir"] = ""  # a path of one machine
    records = metrics.read(workdir)
    rates = [record["images_per_second"] for record in records if record["kind"] == "train"]
    return {
        "network": name,
        "data": arguments.data_name,
        "config": settings,
        "started_with": json.loads((workdir / "versions.json").read_text())[0],
        "images_per_second_median": statistics.median(rates) if rates else None,
        "diverged": diverged,
        "epochs": [record for record in records if record["kind"] == "epoch"],
    }


def table(results: list[dict[str, Any]], title: str) -> str:
    """Test accuracy by epoch, a row per network."""
    epochs = max(len(result["epochs"]) for result in results)
    head = ["network", *(f"epoch {i + 1}" for i in range(epochs)), "images/s (median)"]
    lines = [head, ["---", *["---:"] * (epochs + 1)]]
    for result in results:
        cells = [f"{record['test_accuracy']:.2%}" for record in result["epochs"]]
        cells += ["diverged" if result["diverged"] else ""] * (epochs - len(cells))
        rate = result["images_per_second_median"]
        lines.append([result["network"], *cells, "" if rate is None else f"{rate:,.0f}"])
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(results: list[dict[str, Any]], title: str) -> Figure:
    """Train (dashed) and test (solid) accuracy by epoch."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for result in results:
        x = [record["epoch"] for record in result["epochs"]]
        for split, style in (("test", "-"), ("train", "--")):
            y = [100 * record[f"{split}_accuracy"] for record in result["epochs"]]
            color = NETWORKS[result["network"]][2]
            axes.plot(x, y, style, marker="o", markersize=3, color=color, label=f"{result['network']}, {split}")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/<class> and test/<class>")
    parser.add_argument("--data-name", required=True, help="what the data is called in the results")
    parser.add_argument("--name", default="cifar10_first_epochs", help="of the runs and the results")
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    results = [run(name, arguments) for name in NETWORKS]
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    device = results[0]["started_with"]["device"]
    title = f"ResNet-{arguments.depth}, width {arguments.width}, {arguments.data_name}"
    title += f", {device['count']} x {device['kind']}, one seed"
    (out / f"{arguments.name}.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    (out / f"{arguments.name}.md").write_text(table(results, title))
    plot(results, title).savefig(out / f"{arguments.name}.png", dpi=130)
    print(table(results, title))


if __name__ == "__main__":
    main()
