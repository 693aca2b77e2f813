"""State dicts as other programs save them, made from a model of ours.

The names are written on their own, with string operations only: the opposite of the tables under test.
"""

import torch

MLP_LAYERS = {"0": "0", "2": "1", "4": "2"}
LAYER_NAMES = {
    "official": {
        "encoder": {
            "attention": "self_attn",
            "norm": "norm1",
            "feed_forward.norm": "norm2",
            "feed_forward.linear1": "linear1",
            "feed_forward.linear2": "linear2",
        },
        "decoder": {
            "self_attention": "self_attn",
            "cross_attention": "cross_attn",
            "self_norm": "norm2",
            "cross_norm": "norm1",
            "feed_forward.norm": "norm3",
            "feed_forward.linear1": "linear1",
            "feed_forward.linear2": "linear2",
        },
    },
    "detrex": {
        "encoder": {
            "attention": "attentions.0",
            "norm": "norms.0",
            "feed_forward.norm": "norms.1",
            "feed_forward.linear1": "ffns.0.layers.0.0",
            "feed_forward.linear2": "ffns.0.layers.1",
        },
        "decoder": {
            "self_attention": "attentions.0.attn",
            "cross_attention": "attentions.1",
            "self_norm": "norms.0",
            "cross_norm": "norms.1",
            "feed_forward.norm": "norms.2",
            "feed_forward.linear1": "ffns.0.layers.0.0",
            "feed_forward.linear2": "ffns.0.layers.1",
        },
    },
}


def layer_name(own, form):
    part, _, layer, name = own.split(".", 3)
    names = LAYER_NAMES[form][part]
    key = max((k for k in names if name.startswith(f"{k}.")), key=len)
    return f"transformer.{part}.layers.{layer}.{names[key]}{name.removeprefix(key)}"


def official_name(own, laterals):
    part, _, rest = own.partition(".")
    if part == "level_embed":
        return "transformer.level_embed"
    if part == "neck":
        kind, _, rest = rest.partition(".")
        if kind == "backbone":
            return f"backbone.0.{rest}"
        level, _, rest = rest.partition(".")
        return f"input_proj.{int(level) + (laterals if kind == 'extra_levels' else 0)}.{rest}"
    if part == "denoising":
        return "label_enc.weight"
    if rest.startswith("layers."):
        return layer_name(own, "official")
    words = rest.split(".")
    leaf = words[-1]
    if part == "query_selection":
        return {
            "project": f"transformer.enc_output{'_norm' if words[1] == '1' else ''}.{leaf}",
            "class_head": f"transformer.enc_out_class_embed.{leaf}",
            "box_head": f"transformer.enc_out_bbox_embed.layers.{MLP_LAYERS.get(words[1])}.{leaf}",
            "content": "transformer.tgt_embed.weight",
            "size": "transformer.two_stage_wh_embedding.weight",
        }[words[0]]
    return decoder_name(words)


def decoder_name(words):
    leaf = words[-1]
    return {
        "norm": f"transformer.decoder.norm.{leaf}",
        "position": f"transformer.decoder.ref_point_head.layers.{MLP_LAYERS.get(words[1])}.{leaf}",
        "class_heads": f"class_embed.{words[1]}.{leaf}",
        "box_heads": f"bbox_embed.{words[1]}.layers.{MLP_LAYERS.get(words[-2])}.{leaf}",
    }[words[0]]


def detrex_name(own, layers):
    part, _, rest = own.partition(".")
    if rest.startswith("layers."):
        return layer_name(own, "detrex")
    if part == "level_embed":
        return "transformer.level_embeds"
    words = rest.split(".")
    if part == "neck" and words[0] == "backbone":
        return own.removeprefix("neck.")
    if part == "neck":
        kind = {"lateral": "convs", "extra_levels": "extra_convs"}[words[0]]
        return f"neck.{kind}.{words[1]}.{'conv' if words[2] == '0' else 'norm'}.{words[3]}"
    if part == "query_selection" and words[0] == "class_head":
        return f"class_embed.{layers}.{words[-1]}"
    if part == "query_selection" and words[0] == "box_head":
        return f"bbox_embed.{layers}.layers.{MLP_LAYERS[words[1]]}.{words[-1]}"
    return official_name(own, 0)


def with_second_names(state):
    heads = [name for name in state if name.startswith(("bbox_embed.", "class_embed."))]
    return state | {f"transformer.decoder.{name}": state[name] for name in heads}


def official_state(model):
    """As the official program saves it: heads under two names, and one label more. The heads must be shared."""
    laterals = len(model.neck.lateral)
    state = {official_name(own, laterals): value.clone() for own, value in model.state_dict().items()}
    labels = state["label_enc.weight"]
    state["label_enc.weight"] = torch.cat([labels, torch.full_like(labels[:1], 9.0)])
    return with_second_names(state)


def detrex_state(model):
    """As detrex saves it: the encoder's heads behind the decoder's, all under two names."""
    layers = len(model.decoder.layers)
    return with_second_names({detrex_name(k, layers): v.clone() for k, v in model.state_dict().items()})


MMDETECTION_LAYERS = {
    "encoder": {
        "attention": "self_attn",
        "norm": "norms.0",
        "feed_forward.norm": "norms.1",
        "feed_forward.linear1": "ffn.layers.0.0",
        "feed_forward.linear2": "ffn.layers.1",
    },
    "decoder": {
        "self_attention": "self_attn.attn",
        "cross_attention": "cross_attn",
        "self_norm": "norms.0",
        "cross_norm": "norms.1",
        "feed_forward.norm": "norms.2",
        "feed_forward.linear1": "ffn.layers.0.0",
        "feed_forward.linear2": "ffn.layers.1",
    },
}


def mmdetection_name(own, layers):
    part, _, rest = own.partition(".")
    words = rest.split(".")
    leaf = words[-1]
    if part == "level_embed":
        return own
    if part == "denoising":
        return "dn_query_generator.label_embedding.weight"
    if part == "neck":
        if words[0] == "backbone":
            return rest.replace("backbone.body.", "backbone.")
        kind = {"lateral": "convs", "extra_levels": "extra_convs"}[words[0]]
        return f"neck.{kind}.{words[1]}.{'conv' if words[2] == '0' else 'gn'}.{leaf}"
    if words[0] == "layers":
        name = rest.split(".", 2)[2]
        key = max((k for k in MMDETECTION_LAYERS[part] if name.startswith(f"{k}.")), key=len)
        return f"{part}.layers.{words[1]}.{MMDETECTION_LAYERS[part][key]}{name.removeprefix(key)}"
    return {
        "norm": f"decoder.norm.{leaf}",
        "position": f"decoder.ref_point_head.layers.{MLP_LAYERS.get(words[1])}.{leaf}",
        "content": "query_embedding.weight",
        "project": f"memory_trans_{'norm' if words[1] == '1' else 'fc'}.{leaf}",
        "class_head": f"bbox_head.cls_branches.{layers}.{leaf}",
        "box_head": f"bbox_head.reg_branches.{layers}.{words[1]}.{leaf}",
        "class_heads": f"bbox_head.cls_branches.{words[1]}.{leaf}",
        "box_heads": f"bbox_head.reg_branches.{words[1]}.{words[-2]}.{leaf}",
    }[words[0]]


def mmdetection_state(model, bias=False):
    """As mmdetection saves it: the encoder's heads after the decoder's; no bias in the neck, or else `bias`."""
    layers = len(model.decoder.layers)
    state = {mmdetection_name(k, layers): v.clone() for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if bias or not (k.startswith("neck.") and k.endswith(".conv.bias"))}


EFFICIENTNET_LAYERS = {"conv_dw": "_depthwise_conv", "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
EXPANDING = {"conv_pw": "_expand_conv", "bn1": "_bn0", "bn2": "_bn1", "conv_pwl": "_project_conv", "bn3": "_bn2"}
NOT_EXPANDING = {"bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
EFFICIENTNET_ENDS = {
    "conv_stem": "_conv_stem",
    "bn1": "_bn0",
    "conv_head": "_conv_head",
    "bn2": "_bn1",
    "classifier": "_fc",
}


def efficientnet_pytorch_state(state):
    """timm's state dict of an EfficientNet as efficientnet_pytorch saves it: blocks are counted through all stages."""
    blocks = list(dict.fromkeys(key.split(".")[1] + "." + key.split(".")[2] for key in state if "blocks." in key))
    renamed = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        name = EFFICIENTNET_ENDS.get(layer)
        if not name:
            _, stage, block, layer = layer.split(".", 3)
            expands = f"blocks.{stage}.{block}.conv_pwl.weight" in state
            names = EFFICIENTNET_LAYERS | (EXPANDING if expands else NOT_EXPANDING)
            name = f"_blocks.{blocks.index(f'{stage}.{block}')}.{names[layer]}"
        renamed[f"{name}.{leaf}"] = value
    return renamed


def randomise(model):
    """Other numbers everywhere, also where a model starts from zeros."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.1)
    return model


def equal(one, other):
    """Whether two state dicts have the same names, shapes, types and numbers."""
    return one.keys() == other.keys() and all(
        torch.equal(x, other[k]) and x.dtype == other[k].dtype for k, x in one.items()
    )
