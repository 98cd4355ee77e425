"""The page of all names, made from the tables in which nfjax looks them up."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Table:
    """A dictionary of names.

    Attributes:
        title: What its names stand for.
        module: In which it stands.
        name: Of the dictionary.
        used: Where its names are given.
        called: What an entry is, and how it is called.
    """

    title: str
    module: str
    name: str
    used: str
    called: str


TABLES = (
    Table(
        "Residual rules",
        "nfjax.residual",
        "RESIDUALS",
        "`residual=`, `model.residual`",
        "A function `position -> residual.Rule`.",
    ),
    Table(
        "Initializers",
        "nfjax.initializers",
        "INITIALIZERS",
        "`init=`, `model.init`",
        "An initializer, `(key, shape, dtype) -> kernel`. Each name is also a function, `initializers.<name>()`.",
    ),
    Table(
        "JAX's initializers",
        "nfjax.initializers",
        "OF_JAX",
        "`init=`, `model.init`",
        "As in `jax.nn.initializers`, for any activation.",
    ),
    Table(
        "Activations",
        "nfjax.initializers",
        "ACTIVATIONS",
        "`activation=`",
        "An elementwise function; its gain is known or computed.",
    ),
    Table("Norms", "nfjax.layers", "NORMS", "`norm=`, `model.norm`", "`(features, dtype=, rngs=) -> layer`."),
    Table("Stems", "nfjax.resnet", "STEMS", "`stem=`, `model.stem`", "`(width, spatial_size, conv, rngs=) -> layer`."),
    Table("Blocks", "nfjax.resnet", "BLOCKS", "`block=`, `model.block`", "A subclass of `resnet.Block`."),
    Table(
        "Networks",
        "nfjax.models",
        "MODELS",
        "`model.name`",
        "A function that takes `num_classes=` and its own arguments.",
    ),
    Table(
        "Data sets", "nfjax.data", "DATASETS", "`data.source`", "A function `(directory, image_size) -> data.Dataset`."
    ),
    Table(
        "Collections of data sets",
        "nfjax.data",
        "COLLECTIONS",
        "`data.source`, as `<prefix>:<name>`",
        "A function `(name, directory) -> data.Dataset`.",
    ),
    Table(
        "Optimizers",
        "nfjax.training.optimizers",
        "OPTIMIZERS",
        "`optim.name`",
        "A function of the learning rate, and of those of `momentum=`, `weight_decay=` and `mask=` that it names, that "
        "returns an `optax.GradientTransformation`.",
    ),
    Table(
        "What weight decay applies to",
        "nfjax.training.optimizers",
        "MASKS",
        "`optim.weight_decay_mask`",
        "A function from the parameters to a pytree of booleans: what decays.",
    ),
    Table(
        "Learning-rate schedules",
        "nfjax.training.schedules",
        "SCHEDULES",
        "`optim.schedule`",
        "A function `(peak, epoch_ends) -> schedule`, of the peak rate and the step at which each epoch ends.",
    ),
    Table(
        "Trackers",
        "nfjax.runs.trackers",
        "TRACKERS",
        "`log.trackers`",
        "A class, `(folder, step, settings) -> Tracker`.",
    ),
    Table(
        "Statistics of a signal",
        "nfjax.spp",
        "STATISTICS",
        "",
        "A function `Observed -> [L]`, one number for each of the L blocks.",
    ),
    Table(
        "Formats of exports",
        "nfjax.inference",
        "FORMATS",
        "`--format` of `nfjax export`",
        "A function `(predictor, path) -> probabilities(images)` that writes a file and reads it again, its name, and "
        "bounds.",
    ),
    Table("Operations of RandAugment", "nfjax.augment", "OPERATIONS", "", "An operation of RandAugment."),
)

HEAD = """# Names

Wherever nfjax takes a name, it looks it up in one plain dictionary, and a callable is accepted in its place. A line in
the dictionary makes a name of your own. These are the dictionaries and what is in them; [](../guides/rules.md) and
[](../guides/extending.md) show how to add to them.

"""


def first_paragraph(entry: Any) -> str:
    """Of the entry's docstring; "" where it has none of its own, as a lambda or an instance of a class."""
    said = getattr(entry, "__doc__", None) if hasattr(entry, "__name__") else None
    return " ".join((said or "").partition("\n\n")[0].split())


def rows(table: Table) -> list[tuple[str, str]]:
    """(name, what it is) of each entry."""
    entries = getattr(importlib.import_module(table.module), table.name)
    return [(name, first_paragraph(entry) if _is_ours(entry) else "") for name, entry in entries.items()]


def _is_ours(entry: Any) -> bool:
    return getattr(entry, "__module__", "").startswith("nfjax")


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    for table in TABLES:
        used = f"Given as {table.used}. " if table.used else ""
        known = rows(table)
        if all(what for _, what in known):
            body = ["| name | |", "|---|---|", *(f"| `{name}` | {what} |" for name, what in known)]
        else:
            body = ["Names: " + ", ".join(f"`{name}`" for name, _ in known) + "."]
        data = ["```{eval-rst}", f".. py:data:: {table.module}.{table.name}", "```"]
        parts.append("\n".join([f"## {table.title}", "", *data, "", f"{used}{table.called}", "", *body, ""]))
    return "\n".join(parts)
