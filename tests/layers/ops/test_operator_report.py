import torch

from dino.layers import deform_attn_implementation
from dino.layers.ops import operator
from dino.layers.ops.operator_report import operator_lines


def test_it_names_the_command_that_builds(tmp_path, monkeypatch):
    monkeypatch.setattr(operator, "FOLDER", tmp_path)
    monkeypatch.setattr(operator, "_verdicts", {})
    with deform_attn_implementation("auto"):
        text = "\n".join(operator_lines())
    assert "cpu build: none; `python -m dino.layers.ops.build` builds it" in text
    assert "cpu runs plain PyTorch: it is not built for cpu" in text
    with deform_attn_implementation("reference"):
        assert "cpu runs plain PyTorch: so chosen" in "\n".join(operator_lines())
    with deform_attn_implementation("gather"):
        assert "cpu runs plain PyTorch: so chosen" in "\n".join(operator_lines())
    with deform_attn_implementation("compiled"):
        assert "cpu runs an error: it is not built" in "\n".join(operator_lines())


def test_it_tells_of_a_build_that_does_not_work(tmp_path, monkeypatch):
    (tmp_path / operator.FILES["cpu"]).write_text("nothing that can be loaded")
    (tmp_path / "_deform_attn_cpu.json").write_text(
        '{"architectures": ["generic"], "compiler": "c++ 1", "torch": "2.10.0"}'
    )
    monkeypatch.setattr(operator, "FOLDER", tmp_path)
    monkeypatch.setattr(operator, "_verdicts", {})
    monkeypatch.setattr(operator, "load", lambda device_type: torch.ops.load_library(tmp_path / operator.FILES["cpu"]))
    with deform_attn_implementation("auto"):
        text = "\n".join(operator_lines())
    assert "cpu build: for generic; c++ 1; against torch 2.10.0" in text
    assert "can't be loaded (`python -m dino.layers.ops.build` builds it again)" in text
