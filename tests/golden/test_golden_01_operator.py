"""The deformable attention operator and its module against the official program."""

import pytest
import torch

from dino.layers import MultiScaleDeformableAttention, deform_attn, deform_attn_reference

from .golden import GoldenFile

golden = GoldenFile("01")
OPERATORS = [deform_attn, deform_attn_reference]


def shapes_of(case):
    return [tuple(row) for row in golden[f"{case}/spatial_shapes"].tolist()]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", golden.config["cases"])
def test_operator_and_gradients(case, operator):
    names = ["value", "sampling_locations", "attention_weights"]
    value, locations, weights = inputs = [golden[f"op/{case}/{name}"].clone().requires_grad_() for name in names]
    output = operator(value, shapes_of(f"op/{case}"), locations, weights)
    golden.check(f"op/{case}/output", output)
    gradients = torch.autograd.grad(output, inputs, golden[f"op/{case}/grad_output"])
    for name, gradient in zip(names, gradients, strict=True):
        golden.check(f"op/{case}/grad_{name}", gradient)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_at_edges(operator):
    value, locations, weights = (golden[f"edge/{n}"] for n in ("value", "sampling_locations", "attention_weights"))
    golden.check("edge/output", operator(value, shapes_of("edge"), locations, weights))


def module():
    sizes = golden.config["module"]
    return MultiScaleDeformableAttention(sizes["d_model"], sizes["n_heads"], sizes["n_levels"], sizes["n_points"])


def test_module_starts_as_the_official_one():
    parameters = dict(module().named_parameters())
    for name in golden.below("module/init/"):
        golden.check(f"module/init/{name}", parameters[name])


@pytest.mark.parametrize("variant", sorted({name.split("/")[0] for name in golden.below("module/out/")}))
def test_module_and_gradients(variant):
    reference_name, mask_name = variant.split("_")
    attention = module()
    attention.load_state_dict(golden.below("module/param/"))
    padding = golden["module/padding_mask"]
    if mask_name == "nomask":
        padding = torch.zeros_like(padding)
    inputs = {
        "query": golden["module/query"].clone().requires_grad_(),
        "reference": golden[f"module/{reference_name}"].clone().requires_grad_(),
        "input_flatten": golden["module/input_flatten"].clone().requires_grad_(),
    }
    output = attention(*inputs.values(), padding, shapes_of("module"))
    golden.check(f"module/out/{variant}/output", output)
    output.backward(golden["module/grad_output"])
    leaves = inputs | {f"param/{name}": parameter for name, parameter in attention.named_parameters()}
    for name in golden.below(f"module/out/{variant}/grad/"):
        golden.check(f"module/out/{variant}/grad/{name}", leaves[name].grad)
