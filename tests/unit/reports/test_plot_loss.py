"""plot_loss.py and composable/plots.py: what is drawn, equal bytes, every error message."""

import math
import os
import warnings
from pathlib import Path

import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
from click.testing import CliRunner

import plot_loss
from composable.errors import FormatError
from composable.formats import stats_file
from composable.reports import loss_plot, picture

HEADER = ",".join(stats_file.COLUMNS)
GOOD = f"{HEADER}\n0,,3.0,0,1.5,0\n1,2.5,2.0,10,1.5,0.001\n2,2.0,1.5,10,1.5,0.0005\n"


def stats(folder: Path, name: str = "stats_model.csv", text: str = GOOD) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def run(*arguments: object):
    return CliRunner().invoke(plot_loss.main, [str(argument) for argument in arguments])


def test_reads_all_columns_that_are_drawn(tmp_path: Path) -> None:
    curve = stats_file.read_stats(stats(tmp_path))
    assert curve.label == "stats_model"
    assert curve.epochs == (0, 1, 2)
    assert curve.validation == (3.0, 2.0, 1.5)
    assert np.isnan(curve.training[0])
    assert curve.training[1:] == (2.5, 2.0)


@pytest.mark.parametrize(
    "text", ["\ufeff" + GOOD, GOOD.replace("\n", "\r\n"), GOOD.removesuffix("\n"), GOOD + "\n"]
)
def test_reads_what_spreadsheets_write(tmp_path: Path, text: str) -> None:
    assert stats_file.read_stats(stats(tmp_path, text=text)).validation == (3.0, 2.0, 1.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"stats_model\.csv: the file is empty"),
        (HEADER + "\n", "no epochs below the header"),
        ("epoch,loss\n1,2\n", f'the header is "epoch,loss", expected "{HEADER}"'),
        (GOOD.replace("validation_loss", "val"), 'header is "epoch,training_loss,val,'),
        (GOOD + "3,1.0,1.0,1\n", "row 5 has 4 cells, expected 6"),
        (GOOD + "3,1.0,1.0,1,1,1,1\n", "row 5 has 7 cells, expected 6"),
        (GOOD + "3,1.0,much,1,1,1\n", 'row 5, validation_loss is "much"'),
        (GOOD + "3,1.0,nan,1,1,1\n", 'row 5, validation_loss is "nan"'),
        (GOOD + "3,inf,1.0,1,1,1\n", 'row 5, training_loss is "inf"'),
        (GOOD + "3,1.0,1.0,,1,1\n", 'row 5, training_seconds is ""'),
        (GOOD.replace("0,,3.0", "0,,"), 'row 2, validation_loss is ""'),
        (GOOD.replace("0,,3.0", ",,3.0"), 'row 2, epoch is ""'),
    ],
)
def test_refuses_what_is_no_stats_csv(tmp_path: Path, text: str, message: str) -> None:
    path = stats(tmp_path, text=text)
    with pytest.raises(FormatError, match=message):
        stats_file.read_stats(path)


def test_refuses_binary_files(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    path.write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(FormatError, match=r"loss\.csv: not a CSV file in UTF-8"):
        stats_file.read_stats(path)


def test_defaults_are_stats_model_and_loss_png(tmp_path: Path, monkeypatch) -> None:
    stats(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = run()
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "stats_model.csv"]
    assert '"best_validation_loss": 1.5' in result.stdout


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a.csv", "b.csv"], ["a", "b"]),
        (["x/a.csv", "y/b.csv"], ["a", "b"]),
        (["x/a.csv", "y/a.csv"], ["x/a", "y/a"]),
        (["x/a.csv", "x/a.csv"], ["a", "a"]),
    ],
)
def test_labels_are_the_shortest_names_that_differ(
    tmp_path: Path, names: list[str], labels: list[str]
) -> None:
    curves = stats_file.read_all([stats(tmp_path, name) for name in names])
    assert [curve.label for curve in curves] == labels


def test_same_curves_give_the_same_bytes(tmp_path: Path) -> None:
    curves = stats_file.read_all([stats(tmp_path)])
    first, second = loss_plot.loss_png(curves), loss_plot.loss_png(curves)
    assert first == second
    assert b"tEXt" not in first  # no date, no version of the program


def colours(path: Path) -> set[str]:
    """Colours of the picture's pixels, as hexadecimal text."""
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    return {
        "#{:02X}{:02X}{:02X}".format(*pixel) for pixel in np.unique(pixels.reshape(-1, 3), axis=0)
    }


def test_one_colour_for_each_file(tmp_path: Path) -> None:
    paths = [stats(tmp_path, f"{name}.csv") for name in "ab"]
    for count in (1, 2):
        result = run(*paths[:count], "-o", tmp_path / "loss.png")
        assert result.exit_code == 0, result.output
        drawn = colours(tmp_path / "loss.png")
        assert [color in drawn for color in loss_plot.PALETTE[:3]] == [True, count == 2, False]


def figure_of(curves, monkeypatch):
    """Catch the figure that is drawn."""
    from matplotlib.figure import Figure

    caught = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (caught.append(self), save(self, *a, **k))[1]
    )
    loss_plot.loss_png(curves)
    return caught[0]


def test_styles_labels_and_legend(tmp_path: Path, monkeypatch) -> None:
    curves = stats_file.read_all([stats(tmp_path, "a.csv"), stats(tmp_path, "b.csv")])
    figure = figure_of(curves, monkeypatch)
    axes = figure.axes[0]
    assert axes.get_xlabel().startswith("Epoch")
    assert axes.get_ylabel() == "Loss"
    found = [(line.get_linestyle(), line.get_color()) for line in axes.get_lines()]
    first, second = loss_plot.PALETTE[:2]
    assert found == [("-", first), ("--", first), ("-", second), ("--", second)]
    assert list(axes.get_lines()[0].get_ydata()) == [3.0, 2.0, 1.5]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["a", "b", "validation", "training"]


@pytest.mark.parametrize("name", ["a", "a" * 60])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_legend_never_covers_the_axes(tmp_path: Path, monkeypatch, count: int, name: str) -> None:
    curves = stats_file.read_all([stats(tmp_path, f"{name}{i}.csv") for i in range(count)])
    figure = figure_of(curves, monkeypatch)
    legend = figure.legends[0].get_window_extent()
    axes = figure.axes[0].get_window_extent()
    assert not legend.overlaps(axes)
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert axes.height > 0.4 * figure.bbox.height


def test_styles_of_many_files_differ() -> None:
    styles = {tuple(loss_plot._style(i).values()) for i in range(49)}
    assert len(styles) == 49


def test_an_epoch_in_which_a_variant_diverged_has_no_training_loss(tmp_path: Path) -> None:
    curve = stats_file.read_stats(stats(tmp_path, text=GOOD + "3,,1.0,1,1,1\n"))
    assert math.isnan(curve.training[-1])
    assert curve.validation[-1] == 1.0


@pytest.mark.parametrize(
    ("name", "shown"), [("$x^$", "$x^$"), ("a\x1b[31m\nb", "a\ufffd[31m\ufffdb"), ("_a", "_a")]
)
def test_names_are_drawn_as_they_are(tmp_path: Path, name: str, shown: str) -> None:
    """No formula, of which matplotlib says that it is wrong, and nothing that a font lacks."""
    paths = [stats(tmp_path, f"{name}.csv"), stats(tmp_path, "plain.csv")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_plot.loss_png(stats_file.read_all(paths))
    with matplotlib.rc_context():
        drawn = matplotlib.text.Text(text=picture.words(name))
        text, is_formula = drawn._preprocess_math(drawn.get_text())
    assert (text, is_formula) == (shown, False)


def test_more_epochs_than_a_picture_shows(tmp_path: Path) -> None:
    rows = "1,1,1,1,1,1\n" * (stats_file.MOST_EPOCHS + 1)
    with pytest.raises(FormatError, match="has 10001 rows, at most 10000 were expected"):
        stats_file.read_stats(stats(tmp_path, text=f"{HEADER}\n{rows}"))
    with pytest.raises(FormatError, match="bytes, at most 16777216 were expected"):
        stats_file.read_stats(stats(tmp_path, text=f"{HEADER}\n{rows * 200}"))


def test_numbers_that_cannot_be_drawn(tmp_path: Path) -> None:
    path = stats(tmp_path, text=f"{HEADER}\n0,,1e308,0,1,0\n1,-1e308,-1e308,1,1,1\n")
    result = run(path, "-o", tmp_path / "p.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: the picture cannot be drawn (")
    assert not (tmp_path / "p.png").exists()


def test_huge_pictures_get_fewer_dots() -> None:
    assert picture.dots_per_inch(10, 20, usual=130) == 130
    for size in ((1000, 2), (2, 1000), (300, 300)):
        dots = picture.dots_per_inch(*size, usual=130)
        assert max(size) * dots < 2**16  # as large as matplotlib's images can be
        assert size[0] * size[1] * dots**2 <= 1.001 * 10**8
