"""Denoising queries against the official program, from its recorded draws."""

import pytest
import torch

from dino.layers import ContrastiveDenoising

from .golden import GoldenFile
from .network import read_noise

golden = GoldenFile("04")
CASES = golden.config["cases"]
WITH_OBJECTS = [case for case, settings in CASES.items() if sum(settings["gt_per_image"])]
WITHOUT_OBJECTS = [case for case in CASES if case not in WITH_OBJECTS]


def denoising_of(case):
    settings = CASES[case]
    denoising = ContrastiveDenoising(
        num_classes=golden.config["num_classes"],
        embed_dim=golden.config["hidden_dim"],
        num_denoising=settings["dn_number"],
        label_noise=settings["label_noise_ratio"],
        box_noise=settings["box_noise_scale"],
    )
    rows = denoising.label_embed.num_embeddings  # the official table has one more, which nothing reads
    denoising.label_embed.load_state_dict({"weight": golden[f"{case}/label_enc"][:rows]})
    return denoising


@pytest.mark.parametrize("case", WITH_OBJECTS)
def test_queries_and_mask(case):
    settings, targets = CASES[case], golden.targets(case)
    slots, num_groups = golden[f"{case}/dn_meta"].tolist()
    noise = read_noise(golden, case, 2 * num_groups, sum(settings["gt_per_image"]), settings["label_noise_ratio"])
    noised = denoising_of(case).build(targets, settings["num_queries"], num_groups, noise)
    golden.check(f"{case}/input_query_label", noised.queries.content)
    golden.check(f"{case}/input_query_bbox", noised.queries.box_logits)
    golden.check(f"{case}/attn_mask", noised.queries.attn_mask)
    assert noised.queries.content.shape[1] == slots
    assert noised.num_groups == num_groups


@pytest.mark.parametrize("case", [case for case in WITH_OBJECTS if CASES[case]["dn_number"] >= 50])
def test_number_of_groups(case):
    """Smaller budgets mean something else in the official program: they are a number of groups there."""
    own = denoising_of(case).num_groups(max(CASES[case]["gt_per_image"]))
    assert own == golden[f"{case}/dn_meta"][1].item()


@pytest.mark.parametrize("case", WITHOUT_OBJECTS)
def test_slot_without_objects(case):
    """The official program makes no queries; ours has one slot that is free of charge."""
    denoising, num_queries = denoising_of(case), CASES[case]["num_queries"]
    images = len(CASES[case]["gt_per_image"])
    noised = denoising(golden.targets(case), num_queries)
    assert golden[f"{case}/dn_meta"][0] == 0
    assert noised.num_groups == 0
    assert torch.equal(noised.queries.content, denoising.label_embed.weight[0].expand(images, 1, -1))
    assert torch.equal(noised.queries.box_logits, torch.zeros(images, 1, 4))
    attn_mask = noised.queries.attn_mask
    assert attn_mask.shape == (1 + num_queries, 1 + num_queries)
    assert attn_mask[1:, 0].all(), "a matching query must not see the slot"
    assert not attn_mask[0].any()
    golden.check(f"{case}/attn_mask", attn_mask[1:, 1:])
