"""Everything that the program reads: which file, which commands read it, what they make of it."""

from tests.faults import documents as form
from tests.faults.runner import Kind
from tests.faults.sound import CALIBRATION

CPU = ("--device", "cpu")
LS = ("block_level_finetuning.py", "-m", "model.pth", "--solver", "ls", "--data", "data", "-o",
      "fitted.npy", *CALIBRATION)  # fmt: skip
COMPOSE = ("compose_model.py", "-m", "model.pth", "-o", "made.pth")
COPY = "tests/faults/copy_model.py"
PRUNE = ("prune.py", "-m", "model.pth", "-o", "made.npy")

OWN = (
    Kind(
        "model.pth",
        ("model.pth",),
        ("model.pth", "data"),
        (
            (COPY, "-m", "model.pth"),
            ("evaluate.py", "-m", "model.pth", "--data", "data", "--limit", 2, "--max-length", 6,
             "-o", "e.json", *CPU),
        ),
        ("copy.pth",),
        is_sealed=True,
        documents={".pth": form.MODEL},
        answers=("logits.txt",),
    ),
    Kind(
        "composed model.pth",
        ("composed.pth",),
        ("composed.pth",),
        ((COPY, "-m", "composed.pth"),),
        ("copy.pth",),
        is_sealed=True,
        documents={".pth": form.MODEL},
        answers=("logits.txt",),
    ),
    Kind(
        "bundle modules.npy",
        ("modules.npy",),
        ("model.pth", "modules.npy", "conf.json", "calibration.npy", "data"),
        (COMPOSE, LS),
        ("made.pth", "fitted.npy"),
        is_sealed=True,
        documents={".npy": form.sealed_array("options", "variants")},
        free="^metadata/(options|variants/[0-9]+/stats)",
    ),
    Kind(
        "calibration.npy",
        ("calibration.npy",),
        ("model.pth", "modules.npy", "calibration.npy", "data"),
        (LS,),
        ("fitted.npy",),
        is_sealed=True,
        documents={".npy": form.sealed_array("info", "inputs")},
    ),
    Kind(
        "scores.npz of layers",
        ("scores.npz",),
        ("model.pth", "scores.npz"),
        (
            ("config_generator.py", "-m", "model.pth", "--scores", "scores.npz", "--drop-layers", 1,
             "--stack", "encoder"),
            ("config_generator.py", "-m", "model.pth", "--scores", "scores.npz", "--drop-layers", 1,
             "--stack", "encoder", "--policy", "iterative", "-o", "second.json"),
            ("plot_importance.py", "scores.npz", "-o", "made.png"),
        ),
        ("conf.json", "second.json", "made.png"),
        is_sealed=True,
        documents={".npz": form.ARRAYS},
    ),
    Kind(
        "scores.npz of units",
        ("units.npz",),
        ("model.pth", "units.npz", "conf_prune.json"),
        (
            ("config_generator.py", "-m", "model.pth", "--scores", "units.npz", "--sizes", 0.7),
            (*PRUNE, "--attention", "ranked", "--scores", "units.npz"),
        ),
        ("conf.json", "made.npy"),
        is_sealed=True,
        documents={".npz": form.ARRAYS},
        free="^header/(options|versions|texts|method|model/source)",
    ),
    Kind(
        "conf.json",
        ("conf.json",),
        ("model.pth", "conf.json", "modules.npy"),
        (("prune_scheme_generator.py", "-i", "conf.json", "-o", "scheme.json"), COMPOSE),
        ("scheme.json", "made.pth"),
        documents={".json": form.JSON},
    ),
    Kind(
        "conf_prune.json",
        ("conf_prune.json",),
        ("model.pth", "conf_prune.json"),
        ((*PRUNE, "--attention", "head_l1", "--linear", "l1"),),
        ("made.npy",),
        documents={".json": form.JSON},
        free="^[^/]+/[0-9]+$",  # a number or an object
    ),
    Kind(
        "stats CSV",
        ("stats_baseline.csv",),
        ("stats_baseline.csv",),
        (("plot_loss.py", "stats_baseline.csv", "-o", "made.png"),),
        ("made.png",),
        documents={".csv": form.CSV},
        free="^[1-9][0-9]*/",  # cells are text, of which many others are numbers, too
    ),
    Kind(
        "evaluation JSON",
        ("out/*.json",),
        ("out",),
        (("report.py", "-d", "out"),),
        ("out/report.md",),
        free="per_second",  # shown as it is
        documents={".json": form.JSON},
    ),
)  # fmt: skip


def _folder(layout: str, name: str, free: str = ".", **files: form.Document) -> Kind:
    """A file of a model's folder, which `download_model.py` imports."""
    folder = f"{layout}_folder"
    return Kind(
        name,
        tuple(f"{folder}/{file.replace('__', '.')}" for file in files),
        (folder,),
        (("download_model.py", "-m", folder, "-o", "made.pth"),),
        ("made.pth",),
        free=free,
        documents={file.replace("__", ".").replace("*", ""): form for file, form in files.items()},
    )


FOLDERS = (
    _folder("llama", "config.json", config__json=form.JSON),
    _folder("bert", "model.safetensors", model__safetensors=form.SAFETENSORS),
    _folder("t5", "model.safetensors.index.json", model__safetensors__index__json=form.JSON),
    _folder("bert", "tokenizer.json", tokenizer__json=form.JSON),
    _folder("bert", "tokenizer_config.json", tokenizer_config__json=form.JSON),
    _folder("t5", "generation_config.json", generation_config__json=form.JSON),
    _folder("vit", "preprocessor_config.json", preprocessor_config__json=form.JSON),
    Kind(
        ".gguf",
        ("llama.gguf",),
        ("llama.gguf",),
        (("download_model.py", "-m", "llama.gguf", "-o", "made.pth"),),
        ("made.pth",),
        documents={".gguf": form.NUMBERS},
        free=".",
    ),
)


def _data(
    task: str, name: str, *files: str, data: str = "", free: str = ".", **ends: form.Document
) -> Kind:
    """A file with the data of a task, which `evaluate.py` reads."""
    read = data or task
    model = "model.pth" if task == "translation" else f"{task}.pth"
    options = ("--max-length", 4) if task == "translation" else ()
    return Kind(
        name,
        files,
        (model, read),
        (
            (
                "evaluate.py",
                "-m",
                model,
                "--data",
                read,
                "--limit",
                6,
                "-o",
                "e.json",
                *CPU,
                *options,
            ),
        ),
        ("e.json",),
        free=free,
        documents={f".{end}": form for end, form in ends.items()},
    )


CLASSES, QUESTIONS, IMAGES = "text_classification", "question_answering", "image_classification"
TEXT = form.TEXT_LINES
DATA = (
    _data("translation", "parallel text", "data/test.*", data="data", en=TEXT, de=TEXT),
    _data("translation", "parallel text .gz", "data_gz/test.*", data="data_gz",
          gz=form.zipped(TEXT)),
    _data(CLASSES, "labelled .tsv", f"{CLASSES}/test.tsv", tsv=form.TSV),
    _data(CLASSES, "labelled .csv", "texts.csv", data="texts.csv", csv=form.CSV),
    _data(CLASSES, "labelled .csv.gz", "texts.csv.gz", data="texts.csv.gz",
          gz=form.zipped(form.CSV)),
    _data(CLASSES, "labelled .jsonl", "texts.jsonl", data="texts.jsonl", jsonl=form.JSON_LINES),
    _data("text_similarity", "scored .tsv", "text_similarity/test.tsv", tsv=form.TSV),
    _data(QUESTIONS, "SQuAD .json", f"{QUESTIONS}/test-v1.1.json", free="(version|title|id)$",
          json=form.JSON),
    _data("language_modeling", "plain text", "language_modeling/wiki.test.tokens", tokens=TEXT),
    _data(IMAGES, "images .png", f"{IMAGES}/test/*/*.png", png=form.NUMBERS),
    _data(IMAGES, "images .npz", "images.npz", data="images.npz", npz=form.ARRAYS),
)  # fmt: skip

KINDS = {kind.name: kind for kind in (*OWN, *FOLDERS, *DATA)}
