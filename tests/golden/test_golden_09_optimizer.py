"""Three steps of AdamW with clipped gradients, with and without a trainable backbone."""

import pytest
import torch

from dino.weights import load_weights

from .golden import GoldenFile
from .network import RecordedBackbone, build_criterion, build_network, check_losses, official_parameters, read_noise

golden, start = GoldenFile("09"), GoldenFile("07")
CONFIG, CASES = start.config["config"], golden.config["cases"]
WEIGHTS = start.config["weight_dict"]
PADDING = start["in/image_mask"]
IMAGES = torch.zeros(len(PADDING), 3, *PADDING.shape[1:])


def start_model(case):
    """The network with its start weights, and its parameters by official name."""
    scaled = bool(CASES[case]["group1_names"])
    backbone = RecordedBackbone(start.numbered("in/feat"), PADDING.shape[1:], scaled)
    official = start.below("state_dict/")
    official |= {f"backbone.0.{name}": scale.detach().clone() for name, scale in backbone.named_parameters()}
    model = build_network(CONFIG, backbone)
    assert not load_weights(model, official).problems
    return model, official_parameters(model, official)


def make_optimizer(case, parameters):
    backbone = CASES[case]["group1_names"]
    groups = [[name for name in parameters if name not in backbone], backbone]
    for names, group in zip(groups, CASES[case]["groups"], strict=True):
        assert len(names) == group["n_tensors"]
    return torch.optim.AdamW(
        [
            {"params": [parameters[n] for n in names], "lr": group["lr"], "weight_decay": group["weight_decay"]}
            for names, group in zip(groups, CASES[case]["groups"], strict=True)
        ],
        betas=golden.config["betas"],
        eps=golden.config["eps"],
    )


def losses_of_step(model, step, objects_per_image):
    targets, objects = golden.targets(step), sum(objects_per_image)
    repeats = len(golden[f"{step}/draw/label_p"]) // objects
    noise = read_noise(golden, step, repeats, objects, CONFIG["dn_label_noise_ratio"])
    model.denoising.recall(repeats // 2, noise)
    return build_criterion(CONFIG)(model(IMAGES, PADDING, targets), targets)


@pytest.mark.parametrize("case", CASES)
def test_steps(case):
    model, parameters = start_model(case)
    optimizer = make_optimizer(case, parameters)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for i, objects_per_image in enumerate(CASES[case]["gt_per_step"]):
        losses = losses_of_step(model, f"step{i}", objects_per_image)
        check_losses(golden, f"{case}/step{i}", losses, WEIGHTS)
        total = sum(losses.values())
        golden.check(f"{case}/step{i}/total", total)
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), golden.config["clip_max_norm"])
        golden.check(f"{case}/step{i}/grad_norm", norm)
        optimizer.step()
    assert set(golden.below(f"{case}/final_delta_norm/")) == set(parameters)
    for name, p in parameters.items():
        golden.check(f"{case}/final_delta_norm/{name}", (p - before[name]).norm())
    for name in golden.below(f"{case}/final/"):
        golden.check(f"{case}/final/{name}", parameters[name])
    with torch.no_grad():
        last = model(IMAGES, PADDING).decoder
    golden.check(f"{case}/after/pred_logits", last.logits[-1])
    golden.check(f"{case}/after/pred_boxes", last.boxes[-1])
