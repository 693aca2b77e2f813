"""The network: torch only, torchvision for its backbones."""

from .assembly import build_dino
from .backbones import TimmBackbone, TorchvisionBackbone
from .compile import compile_network
from .cuda_graphs import CudaGraphs
from .dino import DINO
from .neck import ChannelMapper
from .precision import float32_precision, use_float32_precision
from .transformer import Decoder, Encoder, QuerySelection, SharedHeadsDecoder, share_heads

__all__ = [
    "DINO",
    "ChannelMapper",
    "CudaGraphs",
    "Decoder",
    "Encoder",
    "QuerySelection",
    "SharedHeadsDecoder",
    "TimmBackbone",
    "TorchvisionBackbone",
    "build_dino",
    "compile_network",
    "float32_precision",
    "share_heads",
    "use_float32_precision",
]
