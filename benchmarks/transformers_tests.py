"""Run transformers' own common tests of models, configs and image processors over DINO for transformers.

    python benchmarks/transformers_tests.py CHECKOUT [--only WORD ...] [--verbose]

CHECKOUT is a folder of transformers' repository at the version that is installed, or its unpacked source distribution
(`pip download --no-binary :all: --no-deps transformers==VERSION`), which has the common tests too. The modules of tests
that a source distribution lacks are replaced by empty ones, and named. pip install parameterized pytest, which those
tests import.

A table says what passed, what failed, what transformers skips itself, and what does not apply, with the reason. The
program ends with 1 where a test fails, or passes although it is listed as one that does not apply.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import tempfile
import types
import unittest
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

# Beside this file, `kernels.py` would be taken for the library of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import transformers  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from dino.hf import (  # noqa: E402
    DinoDetrConfig,
    DinoDetrForObjectDetection,
    DinoDetrImageProcessor,
    DinoDetrModel,
    modeling_dino_detr,
)
from dino.modeling.detector import resized_size  # noqa: E402

SIZES = {  # fields of the smallest network that has all parts
    "backbone": "test_resnet",
    "use_timm_backbone": True,
    "use_pretrained_backbone": False,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_n_points": 2,
    "decoder_n_points": 3,
    "num_queries": 12,
    "num_denoising": 4,
}
NOT_APPLICABLE: dict[str, str] = {  # test, or a pattern of tests -> why
    "test_call_numpy_4_channels": "pictures become RGB: the network has three channels",
    "test_inputs_embeds": "a model of language has embeddings of inputs",
    "test_load_contiguous_weights": "weights of convolutions are stored channels last, which is faster",
    "test_model_get_set_embeddings": "a model of language has embeddings of inputs",
    "test_valid_kwargs_set": "asks for a public name of the class of settings",
}
if transformers.__version__.startswith("4."):
    NOT_APPLICABLE |= {
        "test_model_weights_reload_no_missing_tied_weights": "4.57 does not name shared heads that a file lacks; they "
        "are initialised",
    }
WORDS = {"passed": "passed", "failed": "FAILED", "skipped": "skipped by transformers", "absent": "not applicable"}


class _Tester:
    """What transformers' mixins ask of a model's tests: a small config, and inputs."""

    batch_size, num_channels, image_size, num_labels, n_targets = 3, 3, 96, 5, 4
    num_hidden_layers, num_attention_heads, hidden_size = 2, SIZES["encoder_attention_heads"], SIZES["d_model"]
    encoder_seq_length = 12**2 + 6**2 + 3**2 + 2**2
    decoder_seq_length = SIZES["num_queries"]
    is_training = True

    def get_config(self) -> DinoDetrConfig:
        return DinoDetrConfig(**SIZES, num_labels=self.num_labels)

    def prepare_config_and_inputs_for_common(self) -> tuple[DinoDetrConfig, dict[str, torch.Tensor]]:
        shape = self.batch_size, self.num_channels, self.image_size, self.image_size
        mask = torch.ones(self.batch_size, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": torch.rand(shape), "pixel_mask": mask}

    def labels(self) -> list[dict[str, torch.Tensor]]:
        """Objects for each image, all of them in it."""
        classes = torch.arange(self.n_targets) % self.num_labels
        boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2], [0.5, 0.5, 0.1, 0.1], [0.2, 0.7, 0.3, 0.3]])
        return [{"class_labels": classes, "boxes": boxes} for _ in range(self.batch_size)]


class _ModelTests:
    """What a model of detection states differently from one of language: as the tests of Deformable DETR do."""

    all_model_classes = (DinoDetrModel, DinoDetrForObjectDetection)
    is_encoder_decoder = True
    test_resize_embeddings = test_pruning = test_head_masking = test_torchscript = False
    test_missing_keys = True
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = _Tester()
        super().setUp()

    def _prepare_for_class(self, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = copy.deepcopy(inputs)
        if return_labels and model_class is DinoDetrForObjectDetection:
            inputs["labels"] = self.model_tester.labels()
        return inputs

    def test_attention_outputs(self) -> None:
        tester, (config, inputs) = self.model_tester, self.model_tester.prepare_config_and_inputs_for_common()
        expected = {
            "encoder_attentions": (tester.encoder_seq_length, 4, config.num_feature_levels, config.encoder_n_points),
            "decoder_attentions": (4, tester.decoder_seq_length, tester.decoder_seq_length),
            "cross_attentions": (tester.decoder_seq_length, 4, config.num_feature_levels, config.decoder_n_points),
        }
        for model_class in self.all_model_classes:
            for asked in ({"output_attentions": True}, {}):
                config.output_attentions = not asked
                with torch.no_grad():
                    outputs = model_class(config).eval()(**inputs, **asked)
                for name, shape in expected.items():
                    assert [tuple(a.shape) for a in outputs[name]] == [(tester.batch_size, *shape)] * 2, name
            config.output_attentions = False
            with torch.no_grad():
                outputs = model_class(config).eval()(**inputs)
            assert not set(expected) & set(outputs)

    def test_forward_signature(self) -> None:
        for model_class in self.all_model_classes:
            names = list(inspect.signature(model_class.forward).parameters)
            assert names[1:3] == ["pixel_values", "pixel_mask"]

    def test_can_init_all_missing_weights(self) -> None:
        """What is not loaded comes from a new network, which has the values of a new model for the same seed."""
        config, build = self.model_tester.get_config(), modeling_dino_detr._build
        seeded = lambda *arguments: (torch.manual_seed(0), build(*arguments))[1]  # noqa: E731
        with patch.object(modeling_dino_detr, "_build", seeded):
            for model_class in self.all_model_classes:
                new = model_class(copy.deepcopy(config)).state_dict()
                filled = model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
                assert not [name for name, x in filled.named_parameters() if x.is_meta]
                assert new.keys() == filled.state_dict().keys()
                assert [k for k, v in filled.state_dict().items() if not torch.equal(v, new[k])] == []

    def test_gradient_checkpointing_enable_disable(self) -> None:
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            flags = [model.is_gradient_checkpointing]
            for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable) * 2:
                switch()
                flags.append(model.is_gradient_checkpointing)
            assert flags == [False, True, False, True, False]

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Blocks run twice, and the gradients are those without checkpointing; torch's wrapper does it, any kind."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = DinoDetrForObjectDetection(config).train()
        runs, gradients = [], []
        layers = [*model.model.network.encoder.layers, *model.model.network.decoder.layers]
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: runs.append(1))
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(0)
            model(**inputs, labels=self.model_tester.labels()).loss.backward()
            gradients.append({name.replace("._checkpoint_wrapped_module", ""): x.grad for name, x in _named(model)})
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        assert len(runs) == len(layers) * 3
        assert [name for name, gradient in gradients[1].items() if gradient is None] == []
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)

    def test_retain_grad_hidden_states_attentions(self) -> None:
        """Of hidden states alone: attention weights are computed beside the operators, which return none."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        outputs = DinoDetrModel(config)(**inputs, output_hidden_states=True)
        states = [*outputs.encoder_hidden_states, *outputs.decoder_hidden_states]
        for state in states:
            state.retain_grad()
        outputs.last_hidden_state.flatten()[0].backward()
        assert [i for i, state in enumerate(states) if state.grad is None] == []


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters that are trained."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


class _ConfigTests:
    """All that transformers' tester of configs checks."""

    def setUp(self) -> None:
        self.model_tester = _Tester()

    def test_config(self) -> None:
        module = importlib.import_module("tests.test_configuration_common")
        common = ["hidden_size", "num_attention_heads"]  # encoder and decoder have numbers of layers of their own
        tester = module.ConfigTester(
            self, config_class=DinoDetrConfig, has_text_modality=False, common_properties=common, **SIZES
        )
        if transformers.__version__.startswith(("4.", "5.0.")):  # it sets widths of 0 and 1, which are refused
            tester.create_and_test_config_common_properties = lambda: None
        tester.run_common_tests()


class _ProcessorTester:
    """Settings of the processor, and pictures, for transformers' tests of image processors."""

    image_processing_classes = {"torchvision": DinoDetrImageProcessor}  # noqa: RUF012
    size = {"shortest_edge": 18, "longest_edge": 1333}  # noqa: RUF012
    batch_size, num_channels, min_resolution, max_resolution = 7, 3, 30, 400

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return {"do_resize": True, "size": dict(self.size), "do_normalize": True, "image_mean": [0.5] * 3}

    def prepare_image_inputs(self, **options: Any) -> list[Any]:
        common = importlib.import_module("tests.test_image_processing_common")
        names = ("batch_size", "min_resolution", "max_resolution", "num_channels")
        return common.prepare_image_inputs(**{name: getattr(self, name) for name in names} | options)

    def prepare_processor_inputs(self, **options: Any) -> dict[str, Any]:
        return {"images": self.prepare_image_inputs(**options)}

    def expected_output_image_shape(self, images: Sequence[Any]) -> tuple[int, int, int]:
        """The shape of the padded batch: each picture's shorter side is resized to 18 pixels."""
        sizes = [_height_and_width(image) for image in images]
        resized = [resized_size(*size, self.size["shortest_edge"], self.size["longest_edge"]) for size in sizes]
        return self.num_channels, max(height for height, _ in resized), max(width for _, width in resized)


def _height_and_width(image: Any) -> tuple[int, int]:
    """Of a PIL image, an array (H, W, C) or a tensor (C, H, W)."""
    if hasattr(image, "getbands"):
        return image.height, image.width
    return tuple(image.shape[-2:] if isinstance(image, torch.Tensor) else image.shape[:2])


class _ProcessorTests:
    """What transformers' tests of image processors ask of the class of tests; 4.57 and 5 ask differently."""

    image_processing_class, fast_image_processing_class = None, DinoDetrImageProcessor
    test_slow_image_processor, test_fast_image_processor, test_cast_dtype = False, True, True
    image_processor_list = (DinoDetrImageProcessor,)
    image_processing_classes = _ProcessorTester.image_processing_classes

    def setUp(self) -> None:
        self.image_processor_tester = _ProcessorTester()

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in the place of those of tests that a source distribution lacks; a class of any name is in them."""

    def __init__(self, checkout: Path):
        self.checkout, self.names = checkout, []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "fetch_hub_objects_for_ci" and not name.startswith("tests."):
            return None
        if name.startswith("tests.") and (self.checkout / name.replace(".", "/")).with_suffix(".py").exists():
            return None
        if (self.checkout / name.replace(".", "/")).is_dir() or (self.checkout / "utils" / f"{name}.py").exists():
            return None
        self.names.append(name)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.config_common_kwargs = {"output_hidden_states": True, "id2label": {0: "label"}, "problem_type": None}
        module.url_to_local_path = str
        module.__getattr__ = lambda name: _empty_class(name)


def _empty_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def make_tests(checkout: Path) -> tuple[list[type[unittest.TestCase]], list[str]]:
    """Classes of tests that join transformers' mixins with what this model needs; the modules that are missing.

    Args:
        checkout: a folder with transformers' `tests`.

    Returns:
        the classes, and the names of modules that the checkout lacks.
    """
    missing = _Missing(checkout)
    sys.path.insert(0, str(checkout))
    sys.meta_path.insert(0, missing)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    modeling_auto.MODEL_MAPPING_NAMES["dino_detr"] = "DinoDetrModel"  # where the tests look for models without a loss
    modeling = importlib.import_module("tests.test_modeling_common")
    images = importlib.import_module("tests.test_image_processing_common")
    bases = {
        "Model": (_ModelTests, modeling.ModelTesterMixin),
        "Config": (_ConfigTests,),
        "Processor": (_ProcessorTests, images.ImageProcessingTestMixin, images.AnnotationFormatTestMixin),
    }
    return [type(name, (*parents, unittest.TestCase), {}) for name, parents in bases.items()], missing.names


def _reason(name: str) -> str | None:
    """Why a test does not apply."""
    return next((why for pattern, why in NOT_APPLICABLE.items() if fnmatchcase(name, pattern)), None)


def run_test(test: unittest.TestCase) -> tuple[str, str, str]:
    """Run a test.

    Returns:
        the result (a key of `WORDS`, or "unlisted"), a line that says why, and the traceback if there is one.
    """
    name, result = test.id().rpartition(".")[2], unittest.TestResult()
    with warnings.catch_warnings(), tempfile.TemporaryFile("w") as sink:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        out, sys.stdout = sys.stdout, sink
        try:
            test.run(result)
        finally:
            sys.stdout = out
    why = _reason(name)
    if result.skipped:
        return ("absent", why, "") if why else ("skipped", result.skipped[0][1], "")
    broken = [*result.failures, *result.errors]
    if broken:
        trace = broken[0][1]
        line = _last_line(trace)
        if line.startswith("FileNotFoundError") and "/tests/fixtures/" in line:
            why = "reads a file that this checkout lacks"
        return ("absent", why, trace) if why else ("failed", line, trace)
    return ("unlisted", f"passes, but is listed: {why}", "") if why else ("passed", "", "")


def _last_line(trace: str) -> str:
    """The error of a traceback, on one line of moderate length."""
    errors = [line for line in trace.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
    return (errors or trace.strip().splitlines())[-1][:300]


def _chosen(cases: Sequence[type[unittest.TestCase]], words: Sequence[str]) -> Iterator[unittest.TestCase]:
    for case in cases:
        for test in unittest.defaultTestLoader.loadTestsFromTestCase(case):
            if not words or any(word in test.id() for word in words):
                yield test


def main() -> None:
    """Run the tests that the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="folder of transformers' repository or source distribution")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only tests with such a word in the name")
    parser.add_argument("--verbose", action="store_true", help="print the traceback of each test that fails")
    arguments = parser.parse_args()
    if not (arguments.checkout / "tests/test_modeling_common.py").is_file():
        parser.error(f"{arguments.checkout}/tests/test_modeling_common.py is missing")
    cases, missing = make_tests(arguments.checkout.resolve())
    counts: dict[str, int] = {}
    for test in _chosen(cases, arguments.only):
        kind, why, trace = run_test(test)
        counts[kind] = counts.get(kind, 0) + 1
        name = test.id().split(".", 1)[-1].replace("__main__.", "")
        print(f"{WORDS.get(kind, 'LISTED'):24} {name}{': ' if why else ''}{' '.join(why.split())}", flush=True)
        if kind == "failed" and arguments.verbose:
            print(trace)
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}")
    print("not in this checkout, replaced by empty modules:", ", ".join(missing) or "none")
    print(", ".join(f"{WORDS.get(kind, 'listed, but passes')}: {count}" for kind, count in counts.items()))
    sys.exit(bool(counts.get("failed") or counts.get("unlisted")))


if __name__ == "__main__":
    main()
