"""What does not belong together, and what is meant to harm: prepared folders and command lines."""

import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from composable.models import checkpoint
from tests.faults import documents as form
from tests.faults.kills import COMMANDS, CPU
from tests.faults.kinds import COMPOSE, LS

#: Command -> files that it reads.
INPUTS = {
    "download_model.py": ("t5_folder/config.json", "t5_folder/tokenizer.json",
                          "t5_folder/model.safetensors.index.json"),
    "rank_importance.py": ("model.pth", "data/train.en"),
    "config_generator.py": ("model.pth",),
    "prune_scheme_generator.py": ("conf.json",),
    "prune.py": ("model.pth", "conf_prune.json", "data/train.en"),
    "compose_model.py": ("model.pth", "conf.json", "modules.npy"),
    "block_level_finetuning.py (ls)": ("model.pth", "modules.npy", "calibration.npy"),
    "model_level_finetuning.py": ("model.pth", "modules_finetuned.npy", "conf.json", "data/val.de"),
    "baseline_finetuning.py": ("composed.pth", "data/train.de"),
    "evaluate.py": ("model.pth", "data/test.en"),
    "plot_loss.py": ("stats_baseline.csv",),
    "plot_importance.py": ("scores.npz",),
    "report.py": ("out/eval_dense.json",),
    "export_model.py": ("model.pth",),
}  # fmt: skip
EVIL = "evil"  # the file that hostile content would make


@dataclass(frozen=True)
class Attack:
    """One case.

    Attributes:
        row: of the report.
        name: what is done.
        command: command line.
        prepare: changes a folder that has all sound files.
        must_refuse: whether only a refusal is right; else also an unchanged result.
        results: files that the command makes.
        intact: input that has to stay as it is; "" for none.
    """

    row: str
    name: str
    command: tuple[Any, ...]
    prepare: Callable[[Path], None] = lambda folder: None
    must_refuse: bool = True
    results: tuple[str, ...] = ()
    intact: str = ""


def replaced(name: str, by: Callable[[Path], None]) -> Callable[[Path], None]:
    """Take a file away and make something else in its place."""

    def prepare(folder: Path) -> None:
        (folder / name).unlink()
        by(folder / name)

    return prepare


def pairings() -> Iterator[Attack]:
    """Sound files that do not belong together."""
    other, composed = ("-m", "other.pth"), ("-m", "composed.pth")
    classes, prune = ("-m", "text_classification.pth"), ("prune.py", "-o", "o.npy")
    lines: dict[str, tuple[Any, ...]] = {
        "bundle of another model": (COMPOSE[0], *other, "-o", "o.pth"),
        "bundle of another model, fitted": (LS[0], *other, *LS[3:]),
        "bundle of another family": (COMPOSE[0], *classes, "-o", "o.pth"),
        "configuration of another family": (*prune, *classes),
        "calibration of other texts": tuple("other_data" if a == "data" else a for a in LS),
        "calibration of fewer texts": tuple(7 if a == 12 else a for a in LS),
        "scores of another model": (
            "config_generator.py", *other, "--scores", "scores.npz", "--drop-layers", 1,
            "--stack", "encoder", "-o", "o.json",
        ),
        "scores of another model, units": (
            *prune, *other, "--attention", "ranked", "--scores", "units.npz",
        ),
        "composed model, dense one needed": ("config_generator.py", *composed, "-o", "o.json"),
        "composed model, pruned again": (*prune, *composed),
        "composed model, composed again": (COMPOSE[0], *composed, "-o", "o.pth"),
        "data of another task": ("evaluate.py", *classes, "--data", "data", *CPU),
        "translation of labelled texts": (
            "evaluate.py", "-m", "model.pth", "--data", "text_classification", *CPU,
        ),
        "text model on images": ("evaluate.py", *classes, "--data", "image_classification", *CPU),
        "bundle as a model": (COMPOSE[0], "-m", "modules.npy", "-o", "o.pth"),
        "calibration as a bundle": (*COMPOSE, "-p", "calibration.npy"),
        "bundle as a calibration": (*LS, "--calibration", "modules.npy"),
        "model as scores": ("plot_importance.py", "model.pth", "-o", "o.png"),
        "scheme as a configuration": (*COMPOSE, "-c", "conf_prune.json"),
        "configuration as a scheme": (*prune, "-m", "model.pth", "-c", "conf.json"),
    }  # fmt: skip
    for name, line in lines.items():
        yield Attack("wrong pairings", name, line)


class Bomb:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {EVIL}",)


def pickles() -> Iterator[Attack]:
    """Files whose reading would run code, in every form that torch and numpy read."""

    def saved(value: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    def arrays(save: Any) -> bytes:
        buffer = io.BytesIO()
        save(buffer, np.array([Bomb()], dtype=object))
        return buffer.getvalue()

    def in_model() -> bytes:
        sound = {"format": "composable.model", "version": checkpoint.VERSION, "config": Bomb()}
        return b"".join(checkpoint.sealed(saved(sound)))

    forms: dict[str, Callable[[], bytes]] = {
        "pickle": lambda: pickle.dumps(Bomb()),
        "torch.save": lambda: saved(Bomb()),
        "sealed torch.save": in_model,
        ".npy of objects": lambda: arrays(np.save),
        ".npz of objects": lambda: arrays(lambda file, value: np.savez(file, header=value)),
    }
    for command, inputs in INPUTS.items():
        for name in inputs:
            for kind, make in forms.items():
                yield Attack(
                    "hostile pickles", f"{kind} as {name}", COMMANDS[command][0],
                    replaced(name, lambda path, make=make: path.write_bytes(make())),
                    results=COMMANDS[command][1], must_refuse=not name.startswith("data/"),
                )  # fmt: skip


def archives() -> Iterator[Attack]:
    """Archives that unpack to gigabytes, or whose names lead elsewhere."""
    row, size = "hostile archives", 3 << 30

    def zip_bomb(path: Path, name: str = "header.npy") -> None:
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open(name, "w", force_zip64=True) as entry,
        ):
            np.lib.format.write_array_header_1_0(
                entry, {"descr": "|u1", "fortran_order": False, "shape": (size,)}
            )
            for _ in range(size >> 24):
                entry.write(bytes(1 << 24))

    def gzip_bomb(path: Path) -> None:
        line = b"a man sits in the house .\n" * 40_000
        with gzip.open(path.with_name(path.name + ".gz"), "wb", compresslevel=1) as file:
            for _ in range(size // len(line)):
                file.write(line)

    def in_model(change: Callable[[Any], None]) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            path = folder / "model.pth"
            tree = form.MODEL.read(path.read_bytes())
            change(tree)
            path.unlink()
            path.write_bytes(form.MODEL.write(tree, ()))

        return prepare

    def escape(*names: str) -> Callable[[Path], None]:
        content = torch.zeros(4, dtype=torch.uint8)
        return in_model(lambda tree: tree["tokenizer"].update(dict.fromkeys(names, content)))

    def shard(target: str) -> Callable[[Path], None]:
        def prepare(path: Path) -> None:
            weights = {"shared.weight": target, "encoder.final_layer_norm.weight": target}
            path.write_text(json.dumps({"metadata": {}, "weight_map": weights}))

        return replaced("t5_folder/model.safetensors.index.json", prepare)

    evaluate = COMMANDS["evaluate.py"][0]
    loss = ("plot_importance.py", "scores.npz", "-o", "o.png")
    yield Attack(row, "scores.npz of 3 GB", loss, replaced("scores.npz", zip_bomb))
    yield Attack(
        row, "images.npz of 3 GB",
        ("evaluate.py", "-m", "image_classification.pth", "--data", "images.npz", *CPU),
        replaced("images.npz", lambda path: zip_bomb(path, "test_images.npy")),
    )  # fmt: skip
    yield Attack(
        row, "text of 3 GB in .gz, --limit 4", evaluate, replaced("data/test.en", gzip_bomb),
    )  # fmt: skip
    names = (f"../{EVIL}", f"/tmp/{EVIL}", f"a/{EVIL}", "..", ".", "", "a\0b", "x" * 300)
    for name in names:
        yield Attack(row, f"tokenizer file {name!a:.20}", evaluate, escape(name))
    copy = COMMANDS["download_model.py"][0]
    for target in (
        "../model.pth",
        "/etc/passwd",
        "tokenizer.json",
        "model-00001-of-00006.safetensors/",
    ):
        yield Attack(row, f"weights in {target}", copy, shard(target))


def special_files() -> Iterator[Attack]:
    """Pipes, folders, devices, loops of links, empty and missing files in the place of inputs."""

    def loop(path: Path) -> None:
        path.symlink_to(path.name)

    places: dict[str, Callable[[Path], None]] = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "loop of links": loop,
        "endless device": lambda path: path.symlink_to("/dev/zero"),
        "empty file": Path.touch,
        "missing file": lambda path: None,
        "link into nothing": lambda path: path.symlink_to("nowhere/at/all"),
        "name of another file": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200)),
    }
    for command, inputs in INPUTS.items():
        line, results = COMMANDS[command]
        for name in inputs:
            for kind, make in places.items():
                measured = name == "calibration.npy" and kind in ("missing file",)
                yield Attack(
                    "special files as inputs", f"{kind} as {name}", line, replaced(name, make),
                    results=results, must_refuse=not measured,
                )  # fmt: skip


def outputs() -> Iterator[Attack]:
    """Outputs that are inputs, by name or through links; and that cannot be written."""
    for command, inputs in INPUTS.items():
        line, _ = COMMANDS[command]
        for flag in _flags(line):
            for name in inputs:
                for how in ("same name", "link", "hard link", "other spelling"):
                    target, prepare = _alias(name, how)
                    yield Attack(
                        "output is an input", f"{how}: {flag} {name}", _with(line, flag, target),
                        prepare, must_refuse=False, intact=name,
                    )  # fmt: skip
        for target in ("x" * 256, "missing/" + "y" * 300, "link", "/proc/new"):
            if command == "report.py":
                continue
            yield Attack(
                "output cannot be written", f"-o {target:.20}", _with(line, "-o", target),
                lambda folder: (folder / "link").symlink_to("/nowhere/at/all"),
            )  # fmt: skip


def _flags(line: tuple[Any, ...]) -> list[str]:
    if line[0] == "report.py":  # its output has a fixed name
        return []
    return ["-o", *(["--stats"] if "finetuning" in line[0] else [])]


def _with(line: tuple[Any, ...], flag: str, value: str) -> tuple[Any, ...]:
    if flag not in line:
        return (*line, flag, value)
    place = line.index(flag) + 1
    return (*line[:place], value, *line[place + 1 :])


def _alias(name: str, how: str) -> tuple[str, Callable[[Path], None]]:
    def link(folder: Path) -> None:
        (folder / "alias").symlink_to(folder / name)

    def hard(folder: Path) -> None:
        os.link(folder / name, folder / "alias")

    if how == "same name":
        return name, lambda folder: None
    if how == "other spelling":
        return f"./data/../{name}", lambda folder: None
    return "alias", link if how == "link" else hard


ATTACKS = (pairings, pickles, archives, special_files, outputs)
