"""The commands of the README, as it writes them, on tiny models in place of the real ones."""

import re
import shlex
from pathlib import Path

from transformers import BertConfig, BertModel

from tests import tiny, tiny_tasks
from tests.end_to_end.conftest import call, save_model
from tests.end_to_end.test_chain import CHAIN
from tests.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(heading: str) -> list[list[str]]:
    """Words of every `python ...` line in the section of a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[0] == "python"]


def run_all(lines: list[list[str]], folder: Path) -> None:
    assert lines
    for script, *args in lines:
        ended = call(script, *args, cwd=folder)
        assert ended.code == 0, f"{script} {args}: {ended.err}"


def test_the_ten_commands_are_those_that_test_chain_runs() -> None:
    first, *others, last = commands("The ten commands")
    assert first == ["download_model.py", "-m", "embedded"]
    assert [*others, last[:1]] == [[script] for script in CHAIN]
    assert last[1:] == ["stats_baseline.csv", "stats_model.csv"]
    written = [name for names in CHAIN.values() for name in names]
    assert {"stats_baseline.csv", "stats_model.csv"} <= set(written)


def test_another_model(tmp_path: Path) -> None:
    encoder = BertModel(BertConfig(**tiny_tasks.ENCODER))
    encoder.save_pretrained(tmp_path / "path/to/bert")
    tiny_tasks.tokenizer().save_pretrained(tmp_path / "path/to/bert")
    tiny_tasks.data("text_classification", tmp_path / "path/to/sst2")
    run_all(commands("Another model"), tmp_path)


def test_a_model_of_a_wanted_size_and_other_rates(tmp_path: Path) -> None:
    save_model(tmp_path / "model/dense.pth", tiny.corpus(tmp_path / "corpus"))
    run_all(commands("A model of a wanted size"), tmp_path)
    inline = re.findall(r"`(config_generator\.py --[^`]+)`", README)
    run_all([line.split() for line in inline], tmp_path)


def test_scripts_and_targets_exist() -> None:
    for script in re.findall(r"\b([a-z_]+\.py)\b", README):
        assert (ROOT / script).is_file(), script
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.split(r"[:\s]+", "".join(re.findall(r"^[a-z\- ]+:(?!=)", makefile, re.M)))
    for target in re.findall(r"(?:^|`| )make ([a-z]\w+)\b", README, re.M):
        assert target in targets


def test_it_is_short_enough_to_read() -> None:
    assert len(README.splitlines()) <= 160


def test_its_pictures_exist() -> None:
    for name in re.findall(r'src(?:set)?="([^"]+)"', README):
        assert (ROOT / name).read_bytes().startswith(b"\x89PNG"), name
