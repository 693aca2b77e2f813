"""A model of the adapter that trains a step in a few hundredths of a second, and samples for it."""

import torch
from torch.utils.data import Dataset

from dino.hf import DinoDetrConfig, DinoDetrForObjectDetection
from tests.tiny import random_boxes

TINY = {
    "backbone": "test_efficientnet",
    "use_timm_backbone": True,
    "use_pretrained_backbone": False,
    "backbone_kwargs": {"norm": "FrozenBN"},  # so that nothing depends on the other pictures of a batch
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_n_points": 2,
    "decoder_n_points": 2,
    "num_queries": 20,
    "num_denoising": 10,
}
NAMES = {0: "red", 1: "green", 2: "blue"}


def tiny_model(seed=0, **fields):
    torch.manual_seed(seed)
    return DinoDetrForObjectDetection(DinoDetrConfig(**{**TINY, "id2label": NAMES, **fields}))


class Samples(Dataset):
    """Noise with random objects; sample n has `counts[n]` of them."""

    def __init__(self, *counts):
        torch.manual_seed(3)
        self.samples = [
            {
                "pixel_values": torch.randn(3, 96, 96),
                "pixel_mask": torch.ones(96, 96, dtype=torch.int64),
                "labels": {"class_labels": torch.randint(3, (n,)), "boxes": random_boxes(n)},
            }
            for n in counts
        ]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def to_batch(samples):
    """A data collator."""
    batch = {key: torch.stack([s[key] for s in samples]) for key in ("pixel_values", "pixel_mask")}
    return {**batch, "labels": [s["labels"] for s in samples]}
