"""What was measured, and what it means."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nfjax import _names, storage
from nfjax.spp import _json
from nfjax.spp._diagnosis import Diagnosis, diagnose
from nfjax.spp._kernels import Kernel
from nfjax.spp._mode import Mode
from nfjax.spp._selection import BLOCKS


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Profile:
    """Signal propagation through a network, one entry per block in execution order.

    Every statistic of `samples` is also an attribute, the median over the seeds, float64 [blocks]:

    - forward_var: Var[x_l] over the whole output tensor of block l.
    - backward_var: Var[dL/dx_l] of the gradient there.
    - channel_sq_mean: The squared mean of each channel, averaged over channels (the last axis); this one and the next
      two are Brock et al.'s (2021a).
    - channel_var: The variance within each channel, averaged over channels.
    - branch_var: Likewise of the residual branch before it is added; NaN where a block has none.
    - branch_share: Var[branch] / Var[x_l] over whole tensors: of what is called a branch, or where nothing is, or where
      a factor behind it makes the block the identity, of x_l - x for the input x that has x_l's shape; NaN where there
      is none.
    - similarity: The cosine between the activations of two examples, averaged over all pairs of the first 16; the first
      axis is taken to count the examples. Close to 1, different inputs have become the same.
    - dead: Of the units (last axis) of the ReLUs since the block before, the share that is 0 for the whole batch and at
      every place; NaN where there is no ReLU, or fewer than 32 examples and places to tell.
    - saturated: Of the values of tanh, erf and the logistic function there, the share within 1 % of its range from a
      bound, where little gradient comes through; NaN where there is none.

    All are population statistics, accumulated in float32.

    Attributes:
        paths: Where each block stands in the model; a block that runs several times is numbered.
        shapes: Of the blocks' outputs.
        dtypes: Likewise.
        seeds: Of the runs.
        samples: Each statistic as float64 [seeds, blocks].
        outputs: What was measured of each block, its path and, where it returns more than one array, the array's place
            in that: "blocks/0[1]".
        mode: In which mode the network ran.
        zeros: Parameters that are all zero and multiply what a block returns, before any other block does, by the
            block's path ("" for what comes before the first); looked for only where a variance is 0 or a block is the
            identity.
        level: What "block" means here: "block", or "layer".
        kernels: Those of the modules that the model calls, of the first seed; none from a `Monitor`, which looks at a
            network that trains.
        unreached: Layers that no gradient reaches; their backward variance is NaN.
        norms: Modules that normalize, as the names of their classes say, anywhere in the model.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    seeds: tuple[int, ...]
    samples: Mapping[str, np.ndarray]
    outputs: tuple[str, ...] = ()
    mode: Mode = dataclasses.field(default_factory=Mode)
    zeros: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    level: str = BLOCKS
    kernels: tuple[Kernel, ...] = ()
    unreached: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.outputs:
            object.__setattr__(self, "outputs", self.paths)

    def __getattr__(self, name: str) -> np.ndarray:
        if name in vars(self).get("samples", ()):
            return self.quantile(name, 0.5)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.samples})

    def quantile(self, statistic: str, q: float) -> np.ndarray:
        """A quantile over the seeds.

        Args:
            statistic: A name in `samples`.
            q: From 0 to 1; 0.5 is the median that the attributes give.

        Returns:
            float64 [blocks].

        Raises:
            ValueError: There is no such statistic.
        """
        samples = _names.lookup("statistic", statistic, self.samples, callables=False)
        # Of the sorted values without interpolation across infinities, which would be NaN.
        return np.quantile(samples, q, axis=0, method="linear" if np.isfinite(samples).all() else "nearest")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def stages(self) -> list[slice]:
        """Runs of blocks whose outputs have the same shape."""
        starts = [i for i in range(len(self)) if i == 0 or self.shapes[i] != self.shapes[i - 1]]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(self)], strict=True)]

    def diagnose(self, tolerance: float = 10.0) -> Diagnosis:
        """Whether the signal survives, both ways, in which mode of the network, and what the verdict rests on.

        Args:
            tolerance: By what factor a variance may leave that of its first block (forward) or of its last (backward)
                and still count as preserved; 10 is our choice.

        Raises:
            ValueError: The tolerance is not more than 1.
        """
        return diagnose(self, tolerance)

    def assert_healthy(self, tolerance: float = 10.0) -> None:
        """For a test of one's own model: the signal survives both ways, and nothing else is wrong that can be known.

        Of layers, whose variances differ by nature, it asks that they are finite, and that no cause is fatal.

        Args:
            tolerance: As for `diagnose`.

        Raises:
            AssertionError: It does not, or something is; the message is the diagnosis, with causes and remedies.
            ValueError: The tolerance is not more than 1.
        """
        if not (found := self.diagnose(tolerance)).healthy:
            raise AssertionError(f"the network is not healthy\n{found}")

    def rows(self) -> Iterator[list[Any]]:
        """A table of the samples: its head, then one row per seed and block, values to seven digits."""
        yield ["seed", "index", "path", "shape", "dtype", *self.samples, "output", "mode"]
        for s, seed in enumerate(self.seeds):
            for i, path in enumerate(self.paths):
                shape = "x".join(map(str, self.shapes[i]))
                values = [f"{self.samples[statistic][s, i]:.7g}" for statistic in self.samples]
                yield [seed, i, path, shape, self.dtypes[i], *values, self.outputs[i], str(self.mode)]

    def to_csv(self, path: str | pathlib.Path) -> None:
        """Writes `rows` as CSV, the whole file or nothing.

        Args:
            path: Of the file.

        Raises:
            OSError: It cannot be written.
        """
        storage.write_csv(pathlib.Path(path), self.rows())

    def to_json(self, path: str | pathlib.Path | None = None) -> str:
        """As JSON, where what is not finite stands as null, "inf" or "-inf".

        Args:
            path: A file that is written, too.

        Returns:
            The text.
        """

        content = {
            "paths": self.paths,
            "shapes": self.shapes,
            "dtypes": self.dtypes,
            "seeds": self.seeds,
            "outputs": self.outputs,
            "mode": {"text": str(self.mode), **dataclasses.asdict(self.mode)},
            "zeros": dict(self.zeros),
            "level": self.level,
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
            "unreached": self.unreached,
            "norms": self.norms,
            **self.samples,
        }
        return _json.write(content, path)

    def __repr__(self) -> str:
        names = tuple(self.samples)
        columns = [getattr(self, name) for name in names]
        shown = [i for i, column in enumerate(columns) if not np.isnan(column).all()]
        # Units that do nothing are told of where there are any.
        shown = [i for i in shown if names[i] not in ("dead", "saturated") or np.nanmax(columns[i]) > 0]
        head = ["", self.level, "output", *(names[i] for i in shown)]
        lines = [head]
        for i, path in enumerate(self.outputs):
            shape = "x".join(map(str, self.shapes[i]))
            lines.append([str(i), path, shape, *(f"{columns[c][i]:.3g}" for c in shown)])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        align = [str.rjust, str.ljust, str.ljust, *([str.rjust] * len(shown))]
        table = [
            "  ".join(a(cell, w) for a, cell, w in zip(align, line, widths, strict=True)).rstrip() for line in lines
        ]
        seeds = f", median of {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        head = f"Profile of {len(self)} {self.level}s, {'/'.join(sorted(set(self.dtypes)))}{seeds}"
        return "\n".join([head, *filter(None, [str(self.mode)]), *table])
