"""The network: torch only, torchvision for its backbones."""

from .backbones import TimmBackbone, TorchvisionBackbone
from .build import build_dino
from .folding import fold_norms
from .neck import ChannelMapper
from .network import DINO
from .onednn import use_onednn
from .transformer import Decoder, Encoder, QuerySelection, share_heads

__all__ = [
    "DINO",
    "ChannelMapper",
    "Decoder",
    "Encoder",
    "QuerySelection",
    "TimmBackbone",
    "TorchvisionBackbone",
    "build_dino",
    "fold_norms",
    "share_heads",
    "use_onednn",
]
