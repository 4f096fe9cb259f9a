"""The table of a pipeline run: scores of every configuration at every stage, and its costs."""

from pathlib import Path
from typing import Any

from composable import files
from composable.errors import FormatError, MismatchError
from composable.formats.config import read_configurations
from composable.reports import rates

PICTURE = "quality.png"
SHORTEST = 30.0  # seconds of an evaluation whose speed is more than a hint
STAGES = {"pruned": "pruned", "block": "+ module-level", "model": "+ model-level"}


def stages_of(directory: Path, indices: list[int]) -> dict[str, str]:
    """Columns of the table; one is of the control experiment, if it was run (make control)."""
    was_run = all((directory / f"eval_baseline_{index}.json").is_file() for index in indices)
    return ({"baseline": "control"} if was_run else {}) | STAGES


def configurations(directory: Path) -> dict[int, str]:
    """Numbers and names of the configurations in conf.json, or else of those that were evaluated.

    Names are those of `rates.names`; without conf.json a number is all that is known of one.
    """
    if (directory / "conf.json").is_file():  # a rerun with fewer may have left evaluations behind
        return dict(enumerate(rates.names(read_configurations(directory / "conf.json"))))
    names = [path.stem.split("_") for path in directory.glob("eval_*_*.json")]
    found = {int(n[2]) for n in names if len(n) == 3 and n[1] in STAGES and n[2].isdecimal()}
    if not found:
        raise FormatError(f"{directory / 'eval_pruned_0.json'}: missing; run evaluate.py -o first.")
    return {number: str(number) for number in sorted(found)}


def read_evaluation(path: Path, dense: dict[str, Any] | None) -> dict[str, Any]:
    """Read one evaluation and check that it can stand beside the dense one."""
    if not path.is_file():
        raise FormatError(f"{path}: missing; run evaluate.py -o {path} (or make pipeline) first.")
    report = files.read_json(path)
    main = main_score(report)
    may_lack = (str, type(None))
    scores = {f"{main}.value": (int, float), f"{main}.signature": str, f"{main}.name": may_lack}
    found = _at(report, "settings")
    settings = found if isinstance(found, dict) else {}
    said = {f"settings.{key}": _SETTINGS[key] for key in _SETTINGS.keys() & settings.keys()}
    for key, kind in {**scores, **_NEEDED, **said}.items():
        value = _at(report, key)
        if not isinstance(value, kind) or isinstance(value, bool):  # which is an int in Python
            raise FormatError(f'{path}: no valid "{key}"; a report of evaluate.py was expected.')
    for what in _COMPARABLE if dense else ():
        if _COMPARABLE[what](report) != _COMPARABLE[what](dense):
            met, expected = _COMPARABLE[what](report), _COMPARABLE[what](dense)
            raise MismatchError(
                f"{path}: {what} is {met}, eval_dense.json has {expected}; evaluate both alike."
            )
    return report


def main_score(report: Any) -> str:
    """Key of the score that stands for all others; reports of old have BLEU alone."""
    main = _at(report, "main")
    return main if isinstance(main, str) else "bleu"


def _name(report: Any) -> str:
    """What the main score is called."""
    return str(report[main_score(report)].get("name", main_score(report)))


def _at(report: Any, key: str) -> Any:
    """Follow a dotted key; None where it leads nowhere."""
    for part in key.split("."):
        report = report.get(part) if isinstance(report, dict) else None
    return report


_NEEDED: dict[str, Any] = {
    **dict.fromkeys(("parameters", "nonzero_parameters", "source_length", "target_length"), int),
    "macs_per_token": (int, float),
    "data.count": int,
    "data.name": (str, type(None)),
    "settings": dict,
}
#: Settings on which the speed depends.
_SETTINGS: dict[str, type] = {"device": str, "dtype": str, "batch_tokens": int}
_COMPARABLE: dict[str, Any] = {
    "the score": main_score,
    "the signature": lambda report: report[main_score(report)]["signature"],
    "the data": lambda report: report["data"],
    "the number of beams": lambda report: report["settings"].get("num_beams"),
    "the maximum length": lambda report: report["settings"].get("max_length"),
    "the length for the MACs": lambda report: (report["source_length"], report["target_length"]),
}


def rate_of(report: Any) -> float | None:
    """Sentences or samples a second; None where the report does not say."""
    found = [report.get(f"{what}_per_second") for what in ("sentences", "samples")]
    return next((float(rate) for rate in found if isinstance(rate, int | float) and rate > 0), None)


def speed_of(report: Any, dense: Any) -> float | None:
    """Say how many times as fast as the dense model; None where not measured alike."""
    alike = all(report["settings"].get(key) == dense["settings"].get(key) for key in _SETTINGS)
    mine, its = rate_of(report), rate_of(dense)
    return mine / its if alike and mine and its else None


def seconds_of(directory: Path, name: str) -> float | None:
    """Seconds that a step took, from the report that the pipeline kept of it, if it did."""
    path = directory / "json" / f"{name}.json"
    seconds = _at(files.read_json(path), "seconds") if path.is_file() else None
    return seconds if isinstance(seconds, int | float) else None


def row_of(
    name: str, stages: dict[str, Any], dense: dict[str, Any], seconds: float | None
) -> dict[str, Any]:
    """One line of the table; costs are those of the last stage."""
    last, main = list(stages.values())[-1], main_score(dense)
    return {
        "configuration": name,
        **{f"{main}_{stage}": report[main]["value"] for stage, report in stages.items()},
        "parameters": last["parameters"],
        "nonzero_parameters": last["nonzero_parameters"],
        "sparsity": 1 - last["nonzero_parameters"] / dense["parameters"],
        "macs_per_token": last["macs_per_token"],
        "macs_of_dense": last["macs_per_token"] / dense["macs_per_token"],
        "speed": speed_of(last, dense),
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]], stages: dict[str, str], dense: dict[str, Any]) -> str:
    """Markdown, with the columns aligned for the eye in a terminal."""
    head = ["configuration", f"{_name(dense)} dense", *stages.values()]
    head += ["parameters", "sparsity", "MACs/token", "of dense", "speed", "seconds"]
    keys = [f"{main_score(dense)}_{stage}" for stage in ("dense", *stages)]
    lines = [head, *(_cells(row, keys) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    padded = [[c.rjust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in padded)


def _cells(row: dict[str, Any], keys: list[str]) -> list[str]:
    scores = [row.get(key) for key in keys]
    return [
        row["configuration"],
        *("" if score is None else f"{score:.2f}" for score in scores),
        f"{row['parameters']:,}",
        f"{row['sparsity']:.1%}",
        f"{row['macs_per_token']:,.0f}",
        f"{row['macs_of_dense']:.1%}",
        "-" if row["speed"] is None else f"{row['speed']:.2f}",
        "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
    ]


def picture(rows: list[dict[str, Any]], stages: dict[str, str], dense: dict[str, Any]) -> bytes:
    """Draw the rows of the configurations, see `quality_plot.quality_figure`; return a PNG."""
    from composable.reports.quality_plot import Point, png_of, quality_figure  # takes a second

    main = main_score(dense)
    points = [
        Point(
            row["configuration"],
            1 - row["sparsity"],
            row["macs_of_dense"],
            {stage: row[f"{main}_{stage}"] for stage in stages},
        )
        for row in rows[1:]
    ]
    score = dense[main]
    label = _name(dense) + (" (lower is better)" if main == "perplexity" else "")
    figure = quality_figure(label, score["value"], interval_of(dense), stages, points)
    return png_of(figure)


def interval_of(report: dict[str, Any]) -> float | None:
    """Half the width of the main score's 95 % interval, where it was measured."""
    found = report[main_score(report)].get("interval_95")
    return float(found) if isinstance(found, int | float) else None


def notes(
    dense: dict[str, Any],
    stages: dict[str, str],
    block_seconds: float | None,
    pictures: dict[str, Path],
) -> str:
    """Say what the numbers are of.

    Args:
        dense: the dense model's evaluation.
        stages: the columns.
        block_seconds: of module-level fine-tuning, if known.
        pictures: what they show -> file.

    Raises:
        FormatError: a picture is missing.
    """
    for picture in pictures.values():
        if not picture.is_file():
            raise FormatError(f"{picture}: missing; run plot_loss.py -o {picture} first.")
    lines = [_about_stages(dense, stages), _about_data(dense), *_about_chance(dense)]
    lines += _about_costs(dense)
    lines.append("Seconds: model-level fine-tuning of that configuration.")
    if block_seconds is not None:
        lines[-1] += f" Module-level fine-tuning, once for all variants: {block_seconds:.1f}."
    lines += [f"{what}: {picture}" for what, picture in pictures.items()]
    return "".join(f"- {line}\n" for line in lines)


def _about_stages(dense: dict[str, Any], stages: dict[str, str]) -> str:
    control = " Control: as pruned, then fine-tuned as a whole." if "baseline" in stages else ""
    return (
        f"A row is a configuration; percentages in its name are shares removed. {_name(dense)} of "
        "the dense model, of the model composed of pruned modules, after module-level and after "
        f"model-level fine-tuning; what follows is of the last.{control}"
    )


def _about_data(dense: dict[str, Any]) -> str:
    data, main, beams = dense["data"], main_score(dense), dense["settings"].get("num_beams")
    return (
        f"Signature: {dense[main]['signature']}, {f'{beams} beam(s), ' if beams else ''}"
        f"{data['count']:,} {_samples(dense)} of {data.get('name')} ({data.get('split')})."
    )


def _samples(dense: dict[str, Any]) -> str:
    return "sentences" if main_score(dense) == "bleu" else "samples"


def _about_chance(dense: dict[str, Any]) -> list[str]:
    """Say how far the score of the dense model depends on which sentences were drawn."""
    interval, count = interval_of(dense), dense["data"]["count"]
    if interval is None:
        return []
    name = _name(dense)
    return [
        f"Chance: {count:,} other {_samples(dense)} of the same kind would give another {name}. "
        f"Of 1,000 test sets drawn from these with replacement (bootstrap), 95 % lie within "
        f"{interval:.1f} of the dense model's {name}. Two models on the same sentences differ by "
        "less than that by chance, yet "
        + (
            "a difference of a point may well be chance."
            if interval > 1
            else f"differences below {interval:.1f} may be chance."
        )
    ]


def _about_costs(dense: dict[str, Any]) -> list[str]:
    source, target = dense["source_length"], dense["target_length"]
    tokens = f"{source} source and {target} target" if source and target else source or target
    lines = [
        "Sparsity: share of the dense model's parameters that is gone or zero. MACs: from shapes, "
        f"{tokens} tokens; a weight that is zero costs as much as another."
    ]
    if rate := rate_of(dense):
        seconds = dense["data"]["count"] / rate
        lines.append(
            f"Speed: {_samples(dense)} a second in this evaluation, relative to the dense model's "
            f"{rate:,.0f}, as measured: once, beside whatever else ran. "
            + (
                f"The dense model took {seconds:.1f} s, too short for more than a hint."
                if seconds < SHORTEST
                else "A few percent more or less say nothing."
            )
        )
    return lines
