"""Time and memory of the calibration and the solves as T5 grows: small, base, large, and on."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.context import Context
from benchmarks.geometry import HEAD, SIZES
from benchmarks.page import Section, Table
from benchmarks.runs import Out
from benchmarks.spread import EXTRAPOLATED, number

#: what is measured: geometry -> sentences, first layers of either stack or None for all, budget
MEASURED: dict[str, tuple[int, int | None, str]] = {
    "small": (320, None, "2G"),
    "small, in groups": (160, None, "256M"),
    "base": (64, None, "2G"),
    "large": (40, 3, "2G"),
}
#: sentences of the default calibration set and of Multi30K's validation split
DEFAULT_SENTENCES = 4096 + 1014
BUDGET = 2 * 2**30
VOCABULARY = 32_128


@dataclass(frozen=True)
class Geometry:
    """Sizes of a T5: width, layers of each stack, inner width of attentions, width of the ffn."""

    width: int
    layers: int
    inner: int
    ffn: int

    @classmethod
    def of(cls, size: str) -> "Geometry":
        """Return one of `geometry.SIZES`."""
        width, layers, heads, ffn = SIZES[size]
        return cls(width, layers, heads * HEAD, ffn)

    @property
    def weights(self) -> int:
        """Weights of all linears: an attention in an encoder layer, two in a decoder layer."""
        return self.layers * (3 * 4 * self.width * self.inner + 2 * 2 * self.width * self.ffn)

    @property
    def parameters(self) -> int:
        """Weights and the embedding; norms and the position bias are left out."""
        return self.weights + VOCABULARY * self.width

    @property
    def squares(self) -> int:
        """Entries of the second moments: inputs of every o, wi and wo."""
        return self.layers * (3 * self.inner**2 + 2 * self.width**2 + 2 * self.ffn**2)

    @property
    def gram_bytes(self) -> int:
        """Memory of all second moments, float64, of calibration and held-out texts."""
        return 2 * 8 * self.squares

    @property
    def passes(self) -> int:
        """How often the texts are run, when the moments may take `BUDGET`."""
        widest = 2 * 8 * max(self.inner, self.width, self.ffn) ** 2
        return max(1, -(-self.gram_bytes // max(BUDGET // widest * widest, widest)))

    def work(self, share: float = 1.0) -> float:
        """Multiply-accumulates of a token in a pass that measures this share of the moments.

        A token runs through one of two stacks; a symmetric product in 4 x 4 blocks does 10 of 16.
        """
        return (self.weights + share * 10 / 16 * self.squares) / 2

    @property
    def shapes(self) -> dict[str, int]:
        """Shapes of the linears that are pruned, and how many there are of each."""
        found: dict[str, int] = {}
        for rows, columns, count in (
            (self.width, self.inner, 3),
            (self.ffn, self.width, 2),
            (self.width, self.ffn, 2),
        ):
            key = f"{rows} x {columns}"
            found[key] = found.get(key, 0) + count * self.layers
        return found


#: not measured, predicted from the largest geometry that is
PREDICTED = {"3B": Geometry(1024, 24, 4096, 16384)}


def probe(context: Context, name: str) -> dict[str, Any]:
    """Measure one line of the table in a process of its own."""
    sentences, layers, budget = MEASURED[name]
    sentences = context.few(sentences, 8)
    run = context.runner.run(
        "benchmarks/growth_probe.py", name.partition(",")[0], context.data, Out("calibration.npy"),
        "--sentences", str(sentences), "--budget", budget,
        *(["--layers", str(layers)] if layers else []),
        *(["--no-solve"] if "," in name else []),
    )  # fmt: skip
    context.runner.drop(run.output("calibration.npy"))
    return {**run.report, "sentences": sentences + sentences // 4}


def whole_minutes(found: dict[str, Any], per_token: float, fixed: float) -> float:
    """Minutes of the default calibration.

    Args:
        found: a measured line, which says how many tokens a sentence has.
        per_token: seconds of a token in all passes.
        fixed: seconds that do not depend on the texts, of all passes.
    """
    tokens = found["tokens"] / found["sentences"] * DEFAULT_SENTENCES
    return (fixed + per_token * tokens) / 60


def calibration_row(name: str, found: dict[str, Any]) -> list[str]:
    """One geometry's calibration: measured, and what the whole of it takes."""
    geometry, (_, layers, budget) = Geometry.of(name.partition(",")[0]), MEASURED[name]
    per_pass = found["seconds_per_token"] / found["passes"]
    count, fixed, mark = found["passes"], found["fixed_seconds"], ""
    if layers is not None:
        count, mark = geometry.passes, EXTRAPOLATED
        fixed *= geometry.layers / layers
    return [
        name,
        f"{found['parameters'] / 1e6:,.0f} M",
        number(geometry.gram_bytes / 1e9),
        f"{budget[:-1]} {budget[-1]}iB",
        f"{mark}{count}",
        number(per_pass * 1000),
        mark + number(fixed),
        EXTRAPOLATED + number(whole_minutes(found, per_pass * count, fixed)),
        number(found["peak_bytes"] / 1e9),
        number(found["peak_of_process"] / 1e9),
    ]


def predicted_row(name: str, found: dict[str, Any]) -> list[str]:
    """Say what a larger geometry takes, from the work of the largest that was measured."""
    geometry, known = PREDICTED[name], Geometry.of("large")
    share = (MEASURED["large"][1] or known.layers) / known.layers
    work = geometry.work(1 / geometry.passes) / known.work(share)
    per_pass = found["seconds_per_token"] / found["passes"] * work
    fixed = found["fixed_seconds"] * geometry.squares / (known.squares * share)
    held = max(BUDGET, 2 * 8 * geometry.ffn**2)
    values = (
        geometry.passes,
        per_pass * 1000,
        fixed,
        whole_minutes(found, per_pass * geometry.passes, fixed),
        held / 1e9,
        (held + 4 * geometry.parameters) / 1e9,
    )
    return [
        name,
        f"{geometry.parameters / 1e6:,.0f} M",
        number(geometry.gram_bytes / 1e9),
        "2 GiB",
        *(EXTRAPOLATED + number(value) for value in values),
    ]


def solve_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Solve of one linear of each shape, and of all of them; then what is predicted."""
    rows, known = [], {}
    for name, report in found.items():
        seconds = {shape: one["seconds"] for shape, one in report["solves"].items()}
        known |= seconds
        rows.append(_solve_row(name, seconds, Geometry.of(name), ""))
    for name, geometry in PREDICTED.items():
        guessed = predict_solves(list(geometry.shapes), known)
        rows.append(_solve_row(name, guessed, geometry, EXTRAPOLATED))
    return rows


def _solve_row(name: str, seconds: dict[str, float], geometry: Geometry, mark: str) -> list[str]:
    total = sum(seconds[shape] * count for shape, count in geometry.shapes.items())
    each = "; ".join(f"{shape}: {mark}{number(value)}" for shape, value in seconds.items())
    return [name, each, EXTRAPOLATED + number(total / 60)]


def predict_solves(shapes: list[str], known: dict[str, float]) -> dict[str, float]:
    """Predict solves from those of other shapes.

    The products of an iteration grow with rows x columns^2, the inverse with columns^3. Both
    factors are fitted, neither below 0, so that the relative errors are small.
    """

    def work(shape: str) -> tuple[float, float]:
        rows, columns = (float(word) for word in shape.split(" x "))
        return rows * columns**2, columns**3

    terms = np.array([work(shape) for shape in known]) / np.array(list(known.values()))[:, None]
    scale = terms.max(0)
    factors = np.linalg.lstsq(terms / scale, np.ones(len(known)), rcond=None)[0]
    if factors.min() < 0:
        products = terms[:, 0]
        factors = np.array([products.sum() / (products @ products) * scale[0], 0.0])
    return {shape: float(np.dot(work(shape), factors / scale)) for shape in shapes}


def measure(context: Context) -> Section:
    """Fill both tables."""
    found = {name: probe(context, name) for name in MEASURED}
    rows = [calibration_row(name, report) for name, report in found.items()]
    rows += [predicted_row(name, found["large"]) for name in PREDICTED]
    calibration = Table(
        ["geometry", "parameters", "all moments, GB", "budget", "passes",
         "s per 1,000 tokens and pass", "s beside that", "minutes for the default texts",
         "peak above the model, GB",
         "peak of the process, GB"],
        rows,
        title="Calibration: CPU seconds of one thread, and memory.",
        note="Moments are float64, of calibration and held-out texts; what exceeds the budget "
        "takes another pass. Beside that: what does not grow with the texts. Minutes: for "
        f"{DEFAULT_SENTENCES:,} sentences. large: moments of {MEASURED['large'][1]} of its "
        "24 + 24 layers, in one pass of the whole model.",
    )  # fmt: skip
    solves = Table(
        ["geometry", "one linear at three rates, CPU s", "all of them, minutes"],
        solve_rows({name: report for name, report in found.items() if report["solves"]}),
        title="Least squares: the first linear of each shape (rows x columns).",
        note="All of them: each shape's seconds times the number of its linears.",
    )
    return Section("As the model grows", [calibration, solves], NOTES, found)


NOTES = [
    "T5's geometries with random weights, captions of Multi30K; one run each. The training of "
    "modules that lost units is not in these tables.",
    "3B (d 1024, 24 + 24 layers, 32 heads of 128, ffn 16384) was not run: its calibration is that "
    "of large times the multiply-accumulates of a token, its solves follow a x rows x columns^2 + "
    "b x columns^3, fitted to the measured shapes.",
]
