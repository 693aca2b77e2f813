"""Precision of float32 on a GPU: TensorFloat-32 rounds the factors of products to 10 bits of mantissa."""

from __future__ import annotations

import torch

PRECISIONS = ("highest", "high", "medium")  # PyTorch's names, also those of Detectron2's `float32_precision`


def use_float32_precision(precision: str) -> None:
    """Set the precision of float32 matrix products and convolutions on NVIDIA's GPUs, for the whole process.

    Sets CUDA's flags only: `torch.set_float32_matmul_precision` would let some CPUs round their factors as well.

    Args:
        precision: "highest" is float32 throughout; "high" and "medium" allow TensorFloat-32. "" keeps PyTorch's
            default: float32 for products, TensorFloat-32 for convolutions.

    Raises:
        ValueError: the precision is none of these.
    """
    if not precision:
        return
    if precision not in PRECISIONS:
        raise ValueError(f"the float32 precision must be one of {', '.join(PRECISIONS)} or empty, not {precision!r}")
    allowed = precision != "highest"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def float32_precision() -> str:
    """The precision in force on a GPU, in words; in PyTorch's names where others set it."""
    try:
        matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:  # somebody has set it by PyTorch's newer names
        matmul, conv = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
        return f"{matmul} products, {conv} convolutions"
    names = {True: "TensorFloat-32", False: "float32"}
    return names[matmul] if matmul == conv else f"{names[matmul]} products, {names[conv]} convolutions"
