"""The network: torch only, torchvision for its backbones."""

from .backbones import TimmBackbone, TorchvisionBackbone
from .build import build_dino
from .compile import compile_network
from .cuda_graphs import CudaGraphs
from .folding import fold_norms
from .neck import ChannelMapper
from .network import DINO
from .onednn import use_onednn
from .precision import float32_precision, use_float32_precision
from .transformer import Decoder, Encoder, QuerySelection, share_heads

__all__ = [
    "DINO",
    "ChannelMapper",
    "CudaGraphs",
    "Decoder",
    "Encoder",
    "QuerySelection",
    "TimmBackbone",
    "TorchvisionBackbone",
    "build_dino",
    "compile_network",
    "float32_precision",
    "fold_norms",
    "share_heads",
    "use_float32_precision",
    "use_onednn",
]
