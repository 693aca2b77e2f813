"""TensorFloat-32: the words of the setting, and that a CPU goes on as before."""

import pytest
import torch

from dino.modeling.precision import float32_precision, use_float32_precision


@pytest.fixture(autouse=True)
def kept():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_the_words():
    for word, allowed in (("highest", False), ("high", True), ("highest", False), ("medium", True)):
        use_float32_precision(word)
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
        assert float32_precision() == ("TensorFloat-32" if allowed else "float32")


def test_nothing_is_left_alone():
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    use_float32_precision("")
    assert float32_precision() == "float32 products, TensorFloat-32 convolutions"


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="one of highest, high, medium or empty, not 'tf32'"):
        use_float32_precision("tf32")


def test_settings_by_newer_names_are_told():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert "tf32 products" in float32_precision() or float32_precision() == "TensorFloat-32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_cpu_computes_as_before():
    """`torch.set_float32_matmul_precision("medium")` would let oneDNN round factors to bfloat16 on some CPUs."""
    a, b, images, weight = (
        torch.randn(256, 256),
        torch.randn(256, 256),
        torch.randn(1, 8, 32, 32),
        torch.randn(8, 8, 3, 3),
    )
    results, before = [], torch.backends.mkldnn.matmul.fp32_precision
    for word in ("highest", "high", "medium"):
        use_float32_precision(word)
        results.append((a @ b, torch.nn.functional.conv2d(images, weight)))
    for products, maps in results[1:]:
        assert torch.equal(products, results[0][0])
        assert torch.equal(maps, results[0][1])
    assert torch.backends.mkldnn.matmul.fp32_precision == before
