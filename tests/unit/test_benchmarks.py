"""The benchmarks' harness: statistics, cache of runs, page. No real measurement."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import composability, growth, levels, page, quality_picture, run, runs, spread
from benchmarks.composability_runs import Family, Point
from benchmarks.composability_runs import Path as Course
from benchmarks.page import Section, Table
from benchmarks.runs import Artifact, Out, Runner
from composable.errors import UserError
from tests.paths import ROOT

FACTS = {
    "cpu": "Some CPU", "cores": 2, "memory_gb": 8, "gpu": None, "versions": {"torch": "2.6"},
    "commit": "abc1234", "is_changed": True, "date": "2026-01-01",
}  # fmt: skip


def section(text: str = "1", **more: Any) -> Section:
    return Section("Title", [Table(["a", "b"], [["x", text]])], ["a note"], facts=[FACTS], **more)


@pytest.mark.parametrize(
    ("values", "text"),
    [([2.0], "2"), ([3.0, 1.0, 2.0], "2 (1 to 3)"), ([1234.0, 1235.0], "1,230 (1,230 to 1,240)")],
)
def test_spread_is_median_and_extremes(values: list[float], text: str) -> None:
    found = spread.of(values)
    assert found.text() == text
    assert found.median == np.median(values)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.23456, "1.23"),
        (123456.0, "123,000"),
        (0.00001234, "0.0000123"),
        (-2.5, "-2.5"),
    ],
)
def test_numbers_have_no_powers_of_ten(value: float, text: str) -> None:
    assert spread.number(value) == text


def test_ratios_are_of_values_that_belong_together() -> None:
    found = spread.ratios([2.0, 8.0, 9.0], [1.0, 2.0, 3.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="longer"):
        spread.ratios([1.0], [1.0, 2.0])


def test_sides_are_called_in_turns() -> None:
    called: list[str] = []
    found = spread.alternate({name: lambda n=name: called.append(n) or n for name in "ab"}, 3)
    assert called == list("ababab")
    assert found == {"a": ["a"] * 3, "b": ["b"] * 3}


@pytest.mark.parametrize(
    ("level", "place", "is_between"),
    [(3.0, 0, False), (5.0, 0, False), (2.0, 10, False), (2.5, 5, True), (1.5, 20, True)],
)
def test_crossing_is_the_first_place_at_or_below(
    level: float, place: float, is_between: bool
) -> None:
    points = [(0.0, 3.0), (10.0, 2.0), (30.0, 1.0), (40.0, 2.5)]
    assert spread.crossing(points, level) == spread.Crossing(place, is_between)


def test_crossing_is_that_of_numpy() -> None:
    points = [(0.0, 3.0), (10.0, 2.0), (30.0, 1.0)]
    steps, losses = zip(*reversed(points), strict=True)
    for level in (1.0, 1.25, 2.0, 2.9):
        found = spread.crossing(points, level)
        assert found is not None
        assert found.place == pytest.approx(np.interp(level, losses, steps))


def test_a_level_below_all_is_not_reached() -> None:
    assert spread.crossing([(0.0, 3.0), (10.0, 2.0)], 1.9) is None


def test_page_replaces_one_section_and_keeps_the_rest() -> None:
    order = ["one", "two", "three"]
    texts = {key: page.markdown(key, section(key), None) for key in order}
    whole = page.replace("", {key: texts[key] for key in ("three", "one")}, order)
    assert [*page.split(whole)] == ["one", "three"]
    again = page.replace(whole, {"two": texts["two"]}, order)
    assert page.split(again) == texts
    assert page.replace(again, {"two": texts["two"]}, order) == again
    assert [*page.split(page.replace(again, {}, ["two"]))] == ["two"]


def test_section_says_where_it_comes_from() -> None:
    text = page.markdown("x_cuda", section(seconds=90), "benchmark_x_cuda.png")
    assert "|x|1|" in text
    assert "Some CPU, 2 cores, 8 GB" in text
    assert "torch 2.6; code at abc1234 with changes; 2026-01-01." in text
    assert "took 1.5 minutes" in text
    assert "python benchmarks/run.py x --device cuda" in text
    assert "](benchmark_x_cuda.png)" in text


def test_states_of_the_code_on_one_machine_are_one_line() -> None:
    later = FACTS | {"commit": "fff0000", "is_changed": False}
    sameday = FACTS | {"date": "2026-01-02"}
    elsewhere = FACTS | {"cpu": "Another CPU"}
    found = page.origin(Section("T", [], facts=[FACTS, later, sameday, elsewhere]))
    assert len(found) == 2
    states = "abc1234 with changes, fff0000"
    assert found[0].endswith(f"torch 2.6; code at {states}; 2026-01-01 and 2026-01-02.")
    assert found[1].startswith("Another CPU")


def test_a_row_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="unequal"):
        Table(["a"], [["1", "2"]], "t").markdown()


def test_result_is_kept_and_drawn(tmp_path: Path) -> None:
    target = tmp_path / "docs" / "page.md"
    run.keep(tmp_path, "bundle", section(picture=b"\x89PNG"), target)
    kept = json.loads((tmp_path / "bundle.json").read_text())
    assert kept["picture"] == "benchmark_bundle.png"
    assert kept["facts"] == [FACTS]
    assert (target.parent / "benchmark_bundle.png").read_bytes() == b"\x89PNG"
    assert [*page.split(target.read_text())] == ["bundle"]
    assert str(tmp_path) not in target.read_text()


def test_picture_of_the_readme_is_that_of_the_results() -> None:
    """Where they differ, run benchmarks/quality_picture.py and put the new values here."""
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    cosines = quality_picture.embeddings(results)
    perplexities = quality_picture.perplexities(results)
    assert cosines == {
        "uniform": [(100, 1.0), (70, 0.9655), (50, 0.9241), (30, 0.8462)],
        "stat": [(100, 1.0), (70, 0.9801), (50, 0.9504), (30, 0.8789)],
    }
    assert perplexities["exchange"] == [(100, 26.39), (80, 30.45), (50, 44.19)]
    assert perplexities["random"] == [(100, 26.39), (80, 40.52), (50, 142.87)]
    assert perplexities["neuron_l1"] == [(100, 26.39), (80, 86.14), (50, 1882.06)]
    picture = quality_picture.draw(results, quality_picture.THEMES["dark"])
    assert picture.startswith(b"\x89PNG")


def test_unknown_benchmark_names_the_known_ones() -> None:
    found = CliRunner().invoke(run.main, ["speed"], standalone_mode=True)
    assert found.exit_code == 2
    assert "module_level, composed_quality, composability, throughput" in found.stderr


@pytest.mark.parametrize("name", run.NAMES)
def test_every_benchmark_has_a_caption_and_a_measure(name: str) -> None:
    assert run.module_of(name).__doc__.splitlines()[0].endswith(".")
    assert callable(run.module_of(name).measure)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that counts its runs, copies its input in capitals and reports."""
    path = tmp_path / "capitals.py"
    path.write_text(
        "import json, os, sys, pathlib\n"
        f"count = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "count.write_text(count.read_text() + 'x' if count.exists() else 'x')\n"
        "if sys.argv[1] == 'fail': sys.exit('Error: no such luck.')\n"
        "text = pathlib.Path(sys.argv[1]).read_text()\n"
        "pathlib.Path(sys.argv[2]).write_text(text.upper())\n"
        "sum(i * i for i in range(3_000_000))\n"
        "print(json.dumps({'length': len(text), 'wrote': sys.argv[2],\n"
        "                  'threads': os.environ['OMP_NUM_THREADS']}))\n"
    )
    return path


def runs_of(script: Path) -> int:
    count = script.with_name("count")
    return len(count.read_text()) if count.exists() else 0


def test_a_run_is_made_once(tmp_path: Path, script: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("abc")
    first = Runner(tmp_path / "runs").run(str(script), Artifact.of(source), Out("out.txt"))
    assert first.report == {"length": 3, "threads": "1"}
    assert (first.folder / "out.txt").read_text() == "ABC"
    assert 0.02 < first.cpu_seconds <= first.wall_seconds * 1.1
    # another process, the same content under another name: the same run
    other = source.rename(tmp_path / "renamed.txt")
    again = Runner(tmp_path / "runs").run(str(script), Artifact.of(other), Out("out.txt"))
    assert runs_of(script) == 1
    assert (again.report, again.cpu_seconds, again.facts) == (
        first.report, first.cpu_seconds, first.facts,
    )  # fmt: skip
    assert again.output("out.txt").sha256 == first.output("out.txt").sha256


@pytest.mark.parametrize("change", ["input", "argument", "threads", "repeat", "fresh"])
def test_what_makes_another_run(tmp_path: Path, script: Path, change: str) -> None:
    source = tmp_path / "in.txt"
    source.write_text("abc")
    Runner(tmp_path / "runs").run(str(script), Artifact.of(source), Out("out.txt"))
    if change == "input":
        source.write_text("abd")
    extra = ["more"] if change == "argument" else []
    options = {change: 2} if change in ("threads", "repeat") else {}
    runner = Runner(tmp_path / "runs", made=set() if change == "fresh" else None)
    made = runner.run(str(script), Artifact.of(source), Out("out.txt"), *extra, **options)
    assert runs_of(script) == 2
    assert made.report["threads"] == ("2" if change == "threads" else "1")
    # what was made afresh is not made again, by another benchmark of the same command either
    for one in (runner, Runner(tmp_path / "runs", made=runner.made)):
        one.run(str(script), Artifact.of(source), Out("out.txt"), *extra, **options)
    assert runs_of(script) == 2


def test_an_interrupted_run_starts_anew(tmp_path: Path, script: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("abc")
    first = Runner(tmp_path / "runs").run(str(script), Artifact.of(source), Out("out.txt"))
    (first.folder / runs.RECORD).unlink()
    (first.folder / "left over").write_text("")
    again = Runner(tmp_path / "runs").run(str(script), Artifact.of(source), Out("out.txt"))
    assert runs_of(script) == 2
    assert not (again.folder / "left over").exists()


def test_a_dropped_output_is_made_again_when_it_is_needed(tmp_path: Path, script: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("abc")
    runner = Runner(tmp_path / "runs")
    first = runner.run(str(script), Artifact.of(source), Out("out.txt")).output("out.txt")
    second = runner.run(str(script), first, Out("out.txt"))
    runner.drop(first)
    assert runner.run(str(script), first, Out("out.txt")).folder == second.folder
    assert runs_of(script) == 2
    third = runner.run(str(script), first, Out("out.txt"), repeat=1)
    assert runs_of(script) == 4
    assert (third.folder / "out.txt").read_text() == "ABC"


def test_a_failing_script_ends_the_benchmark_in_one_line(tmp_path: Path, script: Path) -> None:
    runner = Runner(tmp_path / "runs")
    with pytest.raises(UserError, match="exit code 1: Error: no such luck"):
        runner.parallel([lambda: runner.run(str(script), "fail") for _ in range(3)])
    assert runner.used == {}
    assert runs_of(script) <= 2


def test_drawn_configurations_are_a_prefix_of_a_longer_list() -> None:
    names = [f"a{i}" for i in range(9)], [f"l{i}" for i in range(21)]
    few, many = levels.drawn(4, *names, levels.MILD), levels.drawn(64, *names, levels.MILD)
    assert many[:4] == few
    met = {rate for one in many for name, rate in one.items() if name.startswith("a")}
    assert met == set(levels.MILD.attention)
    share = np.mean([one["l0"] == 0.3 for one in many])
    assert 0.1 < share < 0.6


def path_of(losses: list[float]) -> Course:
    """Individual training: loss 1.8 after 100 s; composed: a loss after every 10 s."""
    alone = {"300": Point(300, 1.8, 100.0, 110.0)}
    composed = [Point(i * 50, loss, i * 10.0, i * 10.0 + 5) for i, loss in enumerate(losses)]
    return Course(alone, composed)


@pytest.mark.parametrize(
    ("losses", "whole", "expected"),
    [
        ([1.7], False, 16 * 100 / 48),  # there from the start: only what is shared costs
        ([1.7], True, 16 * 110 / (48 + 16 * 5)),
        ([1.9, 1.7], False, 16 * 100 / (48 + 16 * 5)),  # half-way between two measured points
        ([1.9, 1.9], False, None),
    ],
)
def test_ratio_counts_what_is_shared_once(
    losses: list[float], whole: bool, expected: float | None
) -> None:
    path = path_of(losses)
    family = Family(levels.MILD, "hybrid", {16: 48.0}, {16: 100}, [path])
    found = composability.ratio(family, path, "300", 16, whole)
    assert found == (None if expected is None else pytest.approx(expected))


def test_what_is_not_reached_is_said() -> None:
    paths = [path_of([1.7]), path_of([1.9, 1.9])]
    family = Family(levels.MILD, "hybrid", {4: 48.0, 16: 48.0}, {4: 9, 16: 9}, paths)
    assert composability._steps(paths, "300").endswith(", 1 not reached")
    assert composability._cell(family, paths, "300", 4, False).endswith(", 1 not reached")


def test_geometry_formulas_are_those_of_the_model() -> None:
    import torch
    from torch import nn

    from benchmarks import geometry

    with torch.device("meta"):
        model = geometry.make_model("small", growth.VOCABULARY)
    found: Any = growth.Geometry.of("small")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "block" in n}
    assert found.weights == sum(m.weight.numel() for m in linears.values())
    pruned = [m for n, m in linears.items() if n.rpartition(".")[2] in ("o", "wi", "wo")]
    assert found.squares == sum(m.in_features**2 for m in pruned)
    counted: dict[str, int] = {}
    for m in pruned:
        key = f"{m.out_features} x {m.in_features}"
        counted[key] = counted.get(key, 0) + 1
    assert found.shapes == counted
    exact = sum(p.numel() for p in model.parameters())
    assert abs(found.parameters / exact - 1) < 1e-3


@pytest.mark.parametrize("factors", [(2e-9, 3e-9), (2e-9, 0.0)])
def test_solves_are_predicted_from_their_two_terms(factors: tuple[float, float]) -> None:
    def seconds(shape: str) -> float:
        rows, columns = (int(word) for word in shape.split(" x "))
        return factors[0] * rows * columns**2 + factors[1] * columns**3

    shapes = ["512 x 512", "2048 x 512", "512 x 2048", "768 x 3072", "1024 x 4096"]
    found = growth.predict_solves(["1024 x 16384"], {shape: seconds(shape) for shape in shapes})
    assert found == {"1024 x 16384": pytest.approx(seconds("1024 x 16384"), rel=1e-6)}
