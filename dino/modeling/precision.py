"""How exactly a GPU computes in float32: TensorFloat-32 rounds the factors of products to 10 bits of mantissa."""

from __future__ import annotations

import torch

PRECISIONS = ("highest", "high", "medium")  # PyTorch's words, in which Detectron2's `float32_precision` is stated


def use_float32_precision(precision: str) -> None:
    """Choose how matrix products and convolutions in float32 run on NVIDIA's GPUs, for the whole process.

    Only CUDA's flags are set: `torch.set_float32_matmul_precision` would let some CPUs round their factors as well.

    Args:
        precision: "highest" is float32 throughout; "high" allows TensorFloat-32, and so does "medium", for which CUDA
            has nothing else. "" leaves PyTorch's own choice: float32 for products, TensorFloat-32 for convolutions.

    Raises:
        ValueError: another word.
    """
    if not precision:
        return
    if precision not in PRECISIONS:
        raise ValueError(f"the float32 precision must be one of {', '.join(PRECISIONS)} or empty, not {precision!r}")
    allowed = precision != "highest"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def float32_precision() -> str:
    """What is in force on a GPU, in words; other settings than these are possible too, and told as PyTorch has them."""
    try:
        matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by PyTorch's newer names, which these refuse to translate
        matmul, conv = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
        return f"{matmul} products, {conv} convolutions"
    names = {True: "TensorFloat-32", False: "float32"}
    return names[matmul] if matmul == conv else f"{names[matmul]} products, {names[conv]} convolutions"
