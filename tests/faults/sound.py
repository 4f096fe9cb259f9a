"""Sound files of every kind, of tiny models; run as a script it makes them in its folder."""

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.end_to_end.forked import Server

#: What trainings here have in common: two epochs of 2 steps.
TRAINING = (
    "--data",
    "data",
    "--epochs",
    2,
    "--batch-size",
    12,
    "--device",
    "cpu",
    "--dtype",
    "float32",
)
#: Texts for `calibration.npy`, as few as will do.
CALIBRATION = ("--limit", 12, "--device", "cpu")
#: Command lines that make one file of the chain after the other, each from those before it.
CHAIN: tuple[tuple[Any, ...], ...] = (
    ("config_generator.py", "-m", "model.pth", "--attention", 0.5, "--linear", 0.3),
    ("prune_scheme_generator.py",),
    ("prune.py", "-m", "model.pth", "--attention", "head_l1", "--linear", "l1"),
    ("compose_model.py", "-m", "model.pth", "-o", "composed.pth"),
    ("rank_importance.py", "-m", "model.pth", "--data", "data", "--iterative", 1,
     "--stack", "encoder", "--distance", "bi_score", "-o", "scores.npz", *CALIBRATION[:2]),
    ("rank_importance.py", "-m", "model.pth", "--method", "stat", "--data", "data",
     "--calibration", "measured.npy", "-o", "units.npz", *CALIBRATION[:2]),
    ("block_level_finetuning.py", "-m", "model.pth", "--solver", "ls", "--data", "data",
     *CALIBRATION),
    ("baseline_finetuning.py", "-m", "composed.pth", "-o", "tuned.pth", *TRAINING),
    ("evaluate.py", "-m", "model.pth", "--data", "data", "-o", "out/eval_dense.json"),
    *(
        ("evaluate.py", "-m", "composed.pth", "--data", "data", "-o", f"out/eval_{stage}_0.json")
        for stage in ("pruned", "block", "model")
    ),
)  # fmt: skip
#: Trained after the chain and killed, so that their checkpoints lie about: name -> command line.
TRAININGS: dict[str, tuple[Any, ...]] = {
    "baseline": ("baseline_finetuning.py", "-m", "composed.pth", "-o", "trained.pth", *TRAINING),
    "model_level": ("model_level_finetuning.py", "-m", "model.pth", "-o", "trained.pth", *TRAINING),
    "block_level": (
        *("block_level_finetuning.py", "-m", "model.pth", "--solver", "grad"),
        *("-o", "trained.npy", *TRAINING),
    ),
    "ls": (
        *("block_level_finetuning.py", "-m", "model.pth", "--solver", "ls", "-o", "trained.npy"),
        *("--data", "data", *CALIBRATION),
    ),
    "hybrid": (
        *("block_level_finetuning.py", "-m", "model.pth", "-o", "trained.npy", "--epochs", 1),
        *("--data", "data", *CALIBRATION),
    ),
}


def make(server: Server, folder: Path) -> None:
    """Make them all; a few seconds, all computing is done in processes of their own."""
    for name, *args in (("tests/faults/sound.py",), *CHAIN):
        options = () if name.startswith("tests") else ("-q",)
        ended = server.run(name, *args, *options, cwd=folder)
        assert ended.code == 0, f"{name}: {ended.err}"
    for path in ("checkpoints", ".composable"):
        shutil.rmtree(folder / path, ignore_errors=True)


def leave_checkpoints(server: Server, sound: Path, name: str, folder: Path) -> None:
    """Copy the chain into `folder`; kill the training `name` there before it writes a result."""
    copy(sound, folder, CHAIN_FILES)
    script, *args = TRAININGS[name]
    call = "bundle" if script.startswith("block") else "output"
    ended = server.run(script, *args, "-q", cwd=folder, call=call)
    assert ended.code == -9, ended.err


CHAIN_FILES = (
    "model.pth", "composed.pth", "conf.json", "conf_prune.json", "modules.npy",
    "modules_finetuned.npy", "calibration.npy", "data",
)  # fmt: skip


def copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Bring files and folders by links, which is fast; whoever changes one unlinks it first."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, copy_function=os.link)
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / name, target / name)


def _make_models() -> None:
    """Everything that no command makes: dense models, data, folders of other programs."""
    import numpy as np

    from composable.models import checkpoint
    from tests import tiny, tiny_tasks

    tiny.corpus(Path("data"), pairs=24)
    tiny.corpus(Path("other_data"), pairs=24, seed=5)
    _zip_texts(Path("data"), Path("data_gz"))
    checkpoint.save(Path("model.pth"), tiny.checkpoint())
    checkpoint.save(Path("other.pth"), tiny.checkpoint(seed=1))
    for task in tiny_tasks.TASKS:
        made = tiny_tasks.checkpoint(task)
        if "classification" in task:
            made.info["labels"] = ["dark", "left"] if task.startswith("image") else ["0", "1"]
        checkpoint.save(Path(f"{task}.pth"), made)
        tiny_tasks.data(task, Path(task), samples=12)
    _labelled_texts()
    images, labels = tiny_tasks.pictures(12)
    np.savez("images.npz", test_images=images, test_labels=labels)
    for layout in ("bert", "llama", "vit"):
        _model_folder(tiny, layout, Path(f"{layout}_folder"))
    _t5_folder(tiny, Path("t5_folder"))
    _gguf(Path("llama.gguf"))


def _zip_texts(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def _labelled_texts() -> None:
    """The classes' test file in all its forms."""
    rows = [
        line.split("\t") for line in Path("text_classification/test.tsv").read_text().split("\n")
    ]
    head, *rest = [row for row in rows if len(row) == 2]
    lines = [json.dumps({"sentence": text, "label": label}) for text, label in rest]
    Path("texts.jsonl").write_text("\n".join(lines) + "\n")
    text = "".join(f'"{first}",{second}\n' for first, second in [head, *rest])
    Path("texts.csv").write_text(text)
    Path("texts.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def _model_folder(tiny: Any, layout: str, folder: Path) -> None:
    channels = {"num_channels": 3} if layout == "vit" else {}
    tiny.build(layout, **channels).save_pretrained(folder)
    if layout == "vit":
        from transformers import ViTImageProcessor

        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    else:
        tiny.tokenizer().save_pretrained(folder)


def _t5_folder(tiny: Any, folder: Path) -> None:
    """In pieces with an index, and with settings of `generate`."""
    model = tiny.t5()
    model.generation_config.max_length = 30
    model.save_pretrained(folder, max_shard_size="30KB")
    tiny.tokenizer().save_pretrained(folder)


def _gguf(path: Path) -> None:
    """A Llama of 2 layers, as llama.cpp writes it."""
    try:
        import gguf
    except ImportError:  # what needs it is skipped
        return
    import numpy as np

    words = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "the"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    draw = np.random.default_rng(0)
    shapes = {
        "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
        "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
        "attn_norm": (32,), "ffn_norm": (32,),
    }  # fmt: skip
    whole = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    whole |= {"token_embd.weight": (len(words), 32), "output.weight": (len(words), 32)}
    for name, shape in {**whole, "output_norm.weight": (32,)}.items():
        writer.add_tensor(
            name, draw.normal(1.0 if "norm" in name else 0.0, 0.2, shape).astype("f4")
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    _make_models()
