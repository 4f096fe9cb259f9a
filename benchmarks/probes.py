#!/usr/bin/env python3
"""Small programs, each measured in a process of its own: bundles, calibration, solves.

Each prints one JSON object. `seconds` are CPU seconds without the imports; `peak_bytes` is how far
the process's memory (resident set) rose above where it stood before.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PATH = click.Path(path_type=Path)
PICKLED = ("thesis", "plain")
FORMS = ("bundle", *PICKLED)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most since the last reset."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def measured(call: Callable[[], Any]) -> dict[str, Any]:
    """Run and return seconds and peak memory; what `call` gives is kept until both are read."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = resident(), time.process_time()
    kept = call()
    seconds = time.process_time() - started
    peak = resident("VmHWM") - before
    del kept
    return {"seconds": round(seconds, 4), "peak_bytes": peak}


@click.group()
def main() -> None:
    """Choose a program."""


def answer(**report: Any) -> None:
    """Print the JSON object."""
    click.echo(json.dumps(report))


@main.command()
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@click.argument("count", type=int)
def lines(source: Path, output: Path, count: int) -> None:
    """Take the first lines of at least 20 words of the first 90 % of a text."""
    from composable.tasks.splits import read_text

    found = read_text(source).split("\n")
    long = [line for line in found[: len(found) * 9 // 10] if len(line.split()) >= 20]
    output.write_text("\n".join(long[:count]) + "\n", encoding="utf-8")
    answer(lines=len(long[:count]))


@main.command()
@click.argument("model", type=PATH)
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@click.argument("tokens", type=int)
def prefix(model: Path, source: Path, output: Path, tokens: int) -> None:
    """Cut a text after so many tokens of a model's tokenizer."""
    from composable.models import checkpoint
    from composable.tasks.splits import read_text

    tokenizer = checkpoint.load(model).tokenizer
    text = read_text(source)[: tokens * 16]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    part = text[: found["offset_mapping"][tokens - 1][1]]
    output.write_text(part, encoding="utf-8")
    answer(tokens=len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]))


@main.command()
@click.argument("form", type=click.Choice(PICKLED))
@click.argument("model", type=PATH)
@click.argument("bundle", type=PATH)
@click.argument("output", type=PATH)
def pickles(form: str, model: Path, bundle: Path, output: Path) -> None:
    """Turn a bundle into a dictionary of torch modules, pickled whole by np.save."""
    from composable.formats import bundle as bundles
    from composable.models import checkpoint

    dense = checkpoint.load(model)
    found = modules_of(dense, bundles.open_bundle(bundle).load_all(), form == "thesis")
    save_pickles(output, found)
    answer(modules=sum(len(entries) for entries in found.values()), bytes=output.stat().st_size)


def modules_of(dense: Any, variants: list[Any], keeps_masks: bool) -> dict[str, list[Any]]:
    """Make a module for every variant: name -> [{"layer": module, "ratio": kept fraction}].

    Args:
        dense: the dense model.
        variants: as prune.py makes them.
        keeps_masks: leave torch's reparametrisation in place (weight_orig, weight_mask and the
            product of both), as the thesis program does; else weights with zeros.
    """
    import copy

    from torch.nn.utils import prune

    from composable.models.surgery import keep_units

    known = {module.name: module for module in dense.family.modules(dense.model)}
    found: dict[str, list[Any]] = {}
    for variant in variants:
        part = copy.deepcopy(dense.model.get_submodule(known[variant.module].holder))
        if variant.kept_units is not None:
            keep_units(part, known[variant.module], variant.kept_units)
        parameters = dict(part.named_parameters())
        for name, tensor in variant.tensors.items():
            parameters[name].data = tensor.clone()
        for name in variant.masks if keeps_masks else ():
            prune.custom_from_mask(part, name, variant.masks[name])
        entry = {"layer": part, "ratio": 1 - variant.entry.rate}
        found.setdefault(variant.module, []).append(entry)
    return found


def save_pickles(path: Path, modules: Any) -> None:
    """Write modules as the thesis program does: an array that holds one Python object."""
    import numpy as np

    np.save(path, modules, allow_pickle=True)


def load_pickles(path: Path) -> Any:
    """Read them; there is no way to read only some."""
    import numpy as np

    return np.load(path, allow_pickle=True).item()


@main.command()
@click.argument("form", type=click.Choice(FORMS))
@click.argument("path", type=PATH)
@click.option("--rate", type=float, help="Of the configuration; without it everything is loaded.")
def load(form: str, path: Path, rate: float | None) -> None:
    """Load one configuration, every module at one rate, or everything."""
    import transformers.models.t5.modeling_t5  # noqa: F401  what the pickles need

    from composable.formats import bundle

    def ours() -> Any:
        reader = bundle.open_bundle(path)
        return [
            reader.load(record)
            for record in reader.records
            if rate is None or record.entry.rate == rate
        ]

    def theirs() -> Any:
        found = load_pickles(path)
        if rate is None:
            return found
        return [e["layer"] for entries in found.values() for e in entries if e["ratio"] == 1 - rate]

    answer(**measured(ours if form == "bundle" else theirs), bytes=path.stat().st_size)


@main.command()
@click.argument("form", type=click.Choice(FORMS))
@click.argument("path", type=PATH)
@click.argument("output", type=PATH)
def save(form: str, path: Path, output: Path) -> None:
    """Load everything, and measure writing it again."""
    from composable.formats import bundle

    if form == "bundle":
        reader = bundle.open_bundle(path)
        whole = bundle.Bundle(reader.fingerprint, reader.load_all(), reader.options)
        found = measured(lambda: bundle.write(output, whole))
    else:
        modules = load_pickles(path)
        found = measured(lambda: save_pickles(output, modules))
    answer(**found, bytes=output.stat().st_size)


@main.command()
@click.argument("model", type=PATH)
def modules(model: Path) -> None:
    """List the prunable modules of a model: name -> kind."""
    from composable.models import checkpoint

    dense = checkpoint.load(model)
    answer(kinds={module.name: module.kind for module in dense.family.modules(dense.model)})


@main.command()
@click.argument("texts", type=PATH)
@click.argument("count", type=int)
@click.argument("models", type=PATH, nargs=-1)
def embeddings(texts: Path, count: int, models: tuple[Path, ...]) -> None:
    """Compare sentence embeddings of models with those of the first: mean cosine of each other.

    TEXTS is a table with the columns sentence and label; a text's embedding is the mean of the last
    states of its tokens.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    from composable.models import checkpoint

    sentences = [line.split("\t")[0] for line in texts.read_text().split("\n")[1 : count + 1]]

    def embed(path: Path) -> torch.Tensor:
        loaded = checkpoint.load(path)
        batch = loaded.tokenizer(sentences, padding=True, return_tensors="pt")
        with torch.inference_mode():
            states = loaded.model.float().eval().base_model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)

    first, *others = map(embed, models)
    answer(cosines=[float(cosine_similarity(first, one).mean()) for one in others])


@main.command()
@click.argument("tokens", type=int)
@click.argument("turns", type=int)
@click.argument("models", type=PATH, nargs=-1)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 32), help="Sizes.")
def latency(tokens: int, turns: int, models: tuple[Path, ...], batches: tuple[int, ...]) -> None:
    """Time forward passes of models in turns: milliseconds by batch size, model, turn.

    TOKENS are those of a text; pictures have the size that the models take.
    """
    import torch

    from composable.models import checkpoint

    loaded = [checkpoint.load(path).model.float().eval() for path in models]
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch in batches:
        sample = sample_of(loaded[0], batch, tokens, generator)
        times: list[list[float]] = [[] for _ in loaded]
        with torch.inference_mode():
            for turn in range(-3, turns):  # the first three only warm up
                for model, mine in zip(loaded, times, strict=True):
                    started = time.perf_counter()
                    model(**sample)
                    if turn >= 0:
                        mine.append(1000 * (time.perf_counter() - started))
        found.append(times)
    answer(milliseconds=found)


def sample_of(model: Any, batch: int, tokens: int, generator: Any) -> dict[str, Any]:
    """Draw a batch of texts of so many tokens, or of pictures."""
    import torch

    if model.main_input_name == "pixel_values":
        shape = (model.config.num_channels, model.config.image_size, model.config.image_size)
        return {"pixel_values": torch.randn((batch, *shape), generator=generator)}
    ids = torch.randint(1000, 20000, (batch, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@main.command()
def start() -> None:
    """Import what the fine-tuning scripts import, and nothing else: what every command takes."""
    import composable.variants.tuning  # noqa: F401

    answer()


@main.command()
@click.argument("data")
@click.argument("output", type=PATH)
@click.argument("train", type=int)
@click.argument("valid", type=int)
def subset(data: str, output: Path, train: int, valid: int) -> None:
    """Write the first pairs of a corpus into the folder of OUTPUT, as a corpus of its own."""
    from composable.tasks import translation

    folder = translation.corpus_folder(data)
    for split, count in (("train", train), ("valid", valid), ("test", valid)):
        corpus = translation.read_corpus(folder, split, count)
        for language, lines in (("en", corpus.source), ("de", corpus.target)):
            text = "".join(f"{line}\n" for line in lines)
            (output.parent / f"{split}.{language}").write_text(text, encoding="utf-8")
    answer(train=train, valid=valid)


if __name__ == "__main__":
    main()
