"""Names and shapes of all tensors of the published files, written from the programs' modules: independent of `dino`.

A template's braces list alternatives: `{0-2}.{weight,bias}` are six names.
"""

import itertools
import re

LEAVES = "{weight,bias}"
FROZEN = "{weight,bias,running_mean,running_var}"
WIDTH, HIDDEN, QUERIES = 256, 2048, 900


def expand(templates):
    """{template: shape} -> {name: shape}."""
    found = {}
    for template, shape in templates.items():
        parts = re.split(r"\{([^}]*)\}", template)
        choices = [alternatives(part) if number % 2 else [part] for number, part in enumerate(parts)]
        for words in itertools.product(*choices):
            name = "".join(words)
            assert name not in found, name
            found[name] = shape
    return found


def alternatives(text):
    first, dash, last = text.partition("-")
    return [str(n) for n in range(int(first), int(last) + 1)] if dash else text.split(",")


def affine(name, out, *shape):
    """The weight and the bias of a layer, or of a norm."""
    return {f"{name}.weight": (out, *shape), f"{name}.bias": (out,)}


# --- backbones


RESNET_STAGES = ((64, 256), (128, 512), (256, 1024), (512, 2048))


def resnet(depths, names):
    """`names` of stage, shortcut and norm: (first convolution, its norm, stage, norm, shortcut, its norm)."""
    first, first_norm, stage, norm, shortcut, shortcut_norm = names
    keys = {f"{first}.weight": (64, 3, 7, 7), f"{first_norm}.{FROZEN}": (64,)}
    inputs = 64
    for number, (depth, (middle, out)) in enumerate(zip(depths, RESNET_STAGES, strict=True)):
        for block in range(depth):
            front = f"{stage.format(number)}.{block}"
            shapes = ((middle, inputs, 1, 1), (middle, middle, 3, 3), (out, middle, 1, 1))
            for conv, shape in enumerate(shapes, 1):
                keys |= {f"{front}.conv{conv}.weight": shape, f"{front}.{norm.format(conv)}.{FROZEN}": (shape[0],)}
            if block == 0:
                keys |= {f"{front}.{shortcut}.weight": (out, inputs, 1, 1), f"{front}.{shortcut_norm}.{FROZEN}": (out,)}
            inputs = out
    return expand(keys)


def detectron2_resnet(depths):
    starts = {0: "res2", 1: "res3", 2: "res4", 3: "res5"}
    named = resnet(depths, ("stem.conv1", "stem.conv1.norm", "stage{}", "conv{}.norm", "shortcut", "shortcut.norm"))
    return {re.sub(r"stage(\d)", lambda match: starts[int(match[1])], name): shape for name, shape in named.items()}


def torchvision_resnet(depths):
    named = resnet(depths, ("conv1", "bn1", "stage{}", "bn{}", "downsample.0", "downsample.1"))
    return {re.sub(r"stage(\d)", lambda m: f"layer{int(m[1]) + 1}", name): shape for name, shape in named.items()}


def swin(width, depths, heads, window, first_map):
    keys = affine("patch_embed.proj", width, 3, 4, 4) | affine("patch_embed.norm", width)
    for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        c = width << stage
        block = f"layers.{stage}.blocks.{{0-{depth - 1}}}"
        keys |= {
            **affine(f"{block}.norm1", c),
            f"{block}.attn.relative_position_bias_table": ((2 * window - 1) ** 2, head),
            f"{block}.attn.relative_position_index": (window**2, window**2),
            **affine(f"{block}.attn.qkv", 3 * c, c),
            **affine(f"{block}.attn.proj", c, c),
            **affine(f"{block}.norm2", c),
            **affine(f"{block}.mlp.fc1", 4 * c, c),
            **affine(f"{block}.mlp.fc2", c, 4 * c),
        }
        if stage < 3:
            keys |= {f"layers.{stage}.downsample.reduction.weight": (2 * c, 4 * c)}
            keys |= affine(f"layers.{stage}.downsample.norm", 4 * c)
        if stage >= first_map:
            keys |= affine(f"norm{stage}", c)
    return expand(keys)


def convnext(width, depths):
    keys = affine("downsample_layers.0.0", width, 3, 4, 4) | affine("downsample_layers.0.1", width)
    for stage, depth in enumerate(depths):
        c = width << stage
        if stage:
            keys |= affine(f"downsample_layers.{stage}.0", c // 2) | affine(f"norm{stage}", c)
            keys |= affine(f"downsample_layers.{stage}.1", c, c // 2, 2, 2)
        block = f"stages.{stage}.{{0-{depth - 1}}}"
        keys |= {
            f"{block}.gamma": (c,),
            **affine(f"{block}.dwconv", c, 1, 7, 7),
            **affine(f"{block}.norm", c),
            **affine(f"{block}.pwconv1", 4 * c, c),
            **affine(f"{block}.pwconv2", c, 4 * c),
        }
    return expand(keys)


def focalnet(levels, window, first_map, width=192, depths=(2, 2, 18, 2)):
    keys = affine("patch_embed.proj", width, 3, 7, 7) | affine("patch_embed.norm", width)
    for stage, depth in enumerate(depths):
        c = width << stage
        block = f"layers.{stage}.blocks.{{0-{depth - 1}}}"
        keys |= {
            f"{block}.gamma_{{1,2}}": (c,),
            f"{block}.norm{{1,2}}.{LEAVES}": (c,),
            **affine(f"{block}.modulation.f", 2 * c + levels + 1, c),
            **affine(f"{block}.modulation.h", c, c, 1, 1),
            **affine(f"{block}.modulation.proj", c, c),
            **affine(f"{block}.mlp.fc1", 4 * c, c),
            **affine(f"{block}.mlp.fc2", c, 4 * c),
        }
        for level in range(levels):
            size = window + 2 * level
            keys |= {f"{block}.modulation.focal_layers.{level}.0.weight": (c, 1, size, size)}
        if stage < 3:
            down = f"layers.{stage}.downsample"
            keys |= affine(f"{down}.proj", 2 * c, c, 3, 3) | affine(f"{down}.norm", 2 * c)
        if stage >= first_map:
            keys |= affine(f"norm{stage}", c)
    return expand(keys)


def vitdet(width, depth, heads, all_of):
    """`all_of`: the blocks that attend to the whole image of 64 x 64 cells; the others see windows of 14."""
    keys = {"net.pos_embed": (1, 1 + 14**2, width), **affine("net.patch_embed.proj", width, 3, 16, 16)}
    for block in range(depth):
        front = f"net.blocks.{block}"
        cells = 64 if block in all_of else 14
        keys |= {
            f"{front}.norm{{1,2}}.{LEAVES}": (width,),
            f"{front}.attn.rel_pos_{{h,w}}": (2 * cells - 1, width // heads),
            **affine(f"{front}.attn.qkv", 3 * width, width),
            **affine(f"{front}.attn.proj", width, width),
            **affine(f"{front}.mlp.fc1", 4 * width, width),
            **affine(f"{front}.mlp.fc2", width, 4 * width),
        }
    keys |= affine("simfp_3.0", width // 2, 2, 2) | {"simfp_3.0.weight": (width, width // 2, 2, 2)}
    for level, first, inputs in ((3, 1, width // 2), (4, 0, width), (5, 1, width)):
        for number, shape in ((first, (WIDTH, inputs, 1, 1)), (first + 1, (WIDTH, WIDTH, 3, 3))):
            keys |= {f"simfp_{level}.{number}.weight": shape, f"simfp_{level}.{number}.norm.{LEAVES}": (WIDTH,)}
    return expand(keys)


# --- the rest of a DINO


def attention(name, levels):
    return {
        **affine(f"{name}.sampling_offsets", 64 * levels, WIDTH),
        **affine(f"{name}.attention_weights", 32 * levels, WIDTH),
        **affine(f"{name}.value_proj", WIDTH, WIDTH),
        **affine(f"{name}.output_proj", WIDTH, WIDTH),
    }


def self_attention(name):
    keys = {f"{name}.in_proj_weight": (3 * WIDTH, WIDTH), f"{name}.in_proj_bias": (3 * WIDTH,)}
    return keys | affine(f"{name}.out_proj", WIDTH, WIDTH)


def box_head(name):
    return {
        f"{name}.layers.{{0,1}}.weight": (WIDTH, WIDTH),
        f"{name}.layers.{{0,1}}.bias": (WIDTH,),
        **affine(f"{name}.layers.2", 4, WIDTH),
    }


def both(levels):
    """What both programs name alike."""
    return {
        **affine("transformer.decoder.norm", WIDTH),
        "transformer.decoder.ref_point_head.layers.0.weight": (WIDTH, 2 * WIDTH),
        "transformer.decoder.ref_point_head.layers.1.weight": (WIDTH, WIDTH),
        "transformer.decoder.ref_point_head.layers.{0,1}.bias": (WIDTH,),
        "transformer.tgt_embed.weight": (QUERIES, WIDTH),
        **affine("transformer.enc_output", WIDTH, WIDTH),
        **affine("transformer.enc_output_norm", WIDTH),
    }


def detrex(backbone, channels, levels):
    """`channels` of the maps that are projected, finest first."""
    encoder, decoder = "transformer.encoder.layers.{0-5}", "transformer.decoder.layers.{0-5}"
    keys = {
        "transformer.level_embeds": (levels, WIDTH),
        **attention(f"{encoder}.attentions.0", levels),
        f"{encoder}.norms.{{0,1}}.{LEAVES}": (WIDTH,),
        **self_attention(f"{decoder}.attentions.0.attn"),
        **attention(f"{decoder}.attentions.1", levels),
        f"{decoder}.norms.{{0-2}}.{LEAVES}": (WIDTH,),
        **both(levels),
        "label_enc.weight": (80, WIDTH),
    }
    for layer in (encoder, decoder):
        keys |= affine(f"{layer}.ffns.0.layers.0.0", HIDDEN, WIDTH) | affine(f"{layer}.ffns.0.layers.1", WIDTH, HIDDEN)
    for front in ("", "transformer.decoder."):
        keys |= affine(f"{front}class_embed.{{0-6}}", 80, WIDTH) | box_head(f"{front}bbox_embed.{{0-6}}")
    for number, c in enumerate(channels):
        keys |= affine(f"neck.convs.{number}.conv", WIDTH, c, 1, 1) | affine(f"neck.convs.{number}.norm", WIDTH)
    if levels > len(channels):
        keys |= affine("neck.extra_convs.0.conv", WIDTH, channels[-1], 3, 3)
        keys |= affine("neck.extra_convs.0.norm", WIDTH)
    return expand(keys) | {f"backbone.{name}": shape for name, shape in backbone.items()}


def official(backbone, channels, levels):
    """`backbone` begins with `body.` for a ResNet."""
    encoder, decoder = "transformer.encoder.layers.{0-5}", "transformer.decoder.layers.{0-5}"
    keys = {
        "transformer.level_embed": (levels, WIDTH),
        **attention(f"{encoder}.self_attn", levels),
        f"{encoder}.norm{{1,2}}.{LEAVES}": (WIDTH,),
        **self_attention(f"{decoder}.self_attn"),
        **attention(f"{decoder}.cross_attn", levels),
        f"{decoder}.norm{{1-3}}.{LEAVES}": (WIDTH,),
        **both(levels),
        **affine("transformer.enc_out_class_embed", 91, WIDTH),
        **box_head("transformer.enc_out_bbox_embed"),
        "label_enc.weight": (92, WIDTH),
    }
    for layer in (encoder, decoder):
        keys |= affine(f"{layer}.linear1", HIDDEN, WIDTH) | affine(f"{layer}.linear2", WIDTH, HIDDEN)
    for front in ("", "transformer.decoder."):
        keys |= affine(f"{front}class_embed.{{0-5}}", 91, WIDTH) | box_head(f"{front}bbox_embed.{{0-5}}")
    for number, c in enumerate(channels):
        keys |= affine(f"input_proj.{number}.0", WIDTH, c, 1, 1) | affine(f"input_proj.{number}.1", WIDTH)
    if levels > len(channels):
        keys |= affine(f"input_proj.{len(channels)}.0", WIDTH, channels[-1], 3, 3)
        keys |= affine(f"input_proj.{len(channels)}.1", WIDTH)
    return expand(keys) | {f"backbone.0.{name}": shape for name, shape in backbone.items()}


def mmdetection(backbone, channels, levels):
    """A DINO of mmdetection 3, whose neck has no biases."""
    encoder, decoder = "encoder.layers.{0-5}", "decoder.layers.{0-5}"
    keys = {
        "level_embed": (levels, WIDTH),
        **attention(f"{encoder}.self_attn", levels),
        f"{encoder}.norms.{{0,1}}.{LEAVES}": (WIDTH,),
        **self_attention(f"{decoder}.self_attn.attn"),
        **attention(f"{decoder}.cross_attn", levels),
        f"{decoder}.norms.{{0-2}}.{LEAVES}": (WIDTH,),
        **affine("decoder.norm", WIDTH),
        **affine("decoder.ref_point_head.layers.0", WIDTH, 2 * WIDTH),
        **affine("decoder.ref_point_head.layers.1", WIDTH, WIDTH),
        "query_embedding.weight": (QUERIES, WIDTH),
        **affine("memory_trans_fc", WIDTH, WIDTH),
        **affine("memory_trans_norm", WIDTH),
        **affine("bbox_head.cls_branches.{0-6}", 80, WIDTH),
        **affine("bbox_head.reg_branches.{0-6}.{0,2}", WIDTH, WIDTH),
        **affine("bbox_head.reg_branches.{0-6}.4", 4, WIDTH),
        "dn_query_generator.label_embedding.weight": (80, WIDTH),
    }
    for layer in (encoder, decoder):
        keys |= affine(f"{layer}.ffn.layers.0.0", HIDDEN, WIDTH) | affine(f"{layer}.ffn.layers.1", WIDTH, HIDDEN)
    kernels = [(f"neck.convs.{number}", (WIDTH, c, 1, 1)) for number, c in enumerate(channels)]
    if levels > len(channels):
        kernels.append(("neck.extra_convs.0", (WIDTH, channels[-1], 3, 3)))
    for name, shape in kernels:
        keys |= {f"{name}.conv.weight": shape, **affine(f"{name}.gn", WIDTH)}
    return expand(keys) | {f"backbone.{name}": shape for name, shape in backbone.items()}


# --- the files


R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
SWIN = {  # width, depths, heads, window
    "t_224": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "s_224": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "b_384": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "l_224": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
    "l_384": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}
CONVNEXT = {
    "t": (96, (3, 3, 9, 3)),
    "s": (96, (3, 3, 27, 3)),
    "b": (128, (3, 3, 27, 3)),
    "l": (192, (3, 3, 27, 3)),
}
VITDET = {"b": (768, 12, 12, (2, 5, 8, 11)), "l": (1024, 24, 16, (5, 11, 17, 23))}


def detrex_file(recipe):
    """{name: shape} of the file of detrex that fits a recipe."""
    family, size, *_ = recipe.removeprefix("dino_").split("_")
    levels = 5 if "5scale" in recipe else 4
    first_map = 5 - levels  # of the stages 0 to 3
    if family in ("r50", "r101"):
        backbone = detectron2_resnet({"r50": R50, "r101": R101}[family])
        return detrex(backbone, [256, 512, 1024, 2048][first_map:], levels)
    if family == "vitdet":
        return detrex(vitdet(*VITDET[size]), [256] * 4, 4)
    if family == "swin":
        numbers = next(value for name, value in SWIN.items() if f"swin_{name}_" in recipe)
        backbone, width = swin(*numbers, first_map), numbers[0]
    elif family == "convnext":
        backbone, width = convnext(*CONVNEXT[size]), CONVNEXT[size][0]
    else:
        backbone = focalnet(*((3, 5) if "fl3" in recipe else (4, 3)), first_map)
        width = 192
    return detrex(backbone, [width << stage for stage in range(first_map, 4)], levels)


def official_file(recipe):
    """{name: shape} of the official program's file that fits a recipe."""
    levels = 5 if "5scale" in recipe else 4
    first_map = 5 - levels
    if "r50" in recipe:
        backbone = {f"body.{name}": shape for name, shape in torchvision_resnet(R50).items()}
        return official(backbone, [256, 512, 1024, 2048][first_map:], levels)
    return official(swin(*SWIN["l_384"], first_map), [192 << stage for stage in range(first_map, 4)], levels)


def mmdetection_file(recipe):
    """{name: shape} of mmdetection's file that fits a recipe; its norms count batches."""
    if "r50" in recipe:
        backbone = torchvision_resnet(R50)
        counters = [name.replace("mean", "x") for name in backbone if name.endswith("running_mean")]
        backbone |= {name.replace("running_x", "num_batches_tracked"): () for name in counters}
        return mmdetection(backbone, [512, 1024, 2048], 4)
    names = (
        ("patch_embed.proj.", "patch_embed.projection."),
        ("layers.", "stages."),
        (".attn.", ".attn.w_msa."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
    )
    backbone = {}
    for name, shape in swin(*SWIN["l_384"], 0).items():
        for theirs, here in names:
            name = name.replace(theirs, here, 1)
        backbone[name] = shape
    return mmdetection(backbone, [192, 384, 768, 1536], 5)


FILES = {"detrex": detrex_file, "official": official_file, "mmdetection": mmdetection_file}
