"""What the golden tests of whole models share: the network of a golden file, and comparisons in official names."""

import torch
from torch import nn

from dino.layers import ContrastiveDenoising, HungarianMatcher, SetCriterion, SinePositionEncoding
from dino.layers.denoising import Noise
from dino.modeling import DINO, ChannelMapper, Decoder, Encoder, QuerySelection, share_heads
from dino.modeling.backbones import FeatureShape
from dino.weights import convert


def read_noise(golden, case, repeats, objects, label_noise):
    """The recorded draws of a case as (R, K) arrays; what was not drawn changes nothing.

    Replacement labels were drawn for replaced entries only.
    """
    shape = (repeats, objects)
    draws = golden.below(f"{case}/draw/")
    replacements = draws.pop("label_new", torch.zeros(0, dtype=torch.int64))
    draws = {name: x.view(*shape, *x.shape[1:]) for name, x in draws.items()}
    chance, nothing = draws.get("label_p", torch.ones(shape)), torch.zeros(*shape, 4)
    labels = torch.zeros(shape, dtype=torch.int64)
    labels[chance < 0.5 * label_noise] = replacements
    return Noise(chance, labels, draws.get("box_sign01", nothing), draws.get("box_part", nothing))


class RecordedDenoising(ContrastiveDenoising):
    """Denoising with recorded draws; `recall` sets them."""

    def recall(self, num_groups, noise):
        self.recorded_groups, self.recorded_noise = num_groups, noise

    def sample(self, target):
        return target

    def num_groups(self, longest):
        return self.recorded_groups

    def draw(self, repeats, labels):
        assert self.recorded_noise.label_chance.shape == (repeats, len(labels))
        return self.recorded_noise


class RecordedBackbone(nn.Module):
    """Returns recorded feature maps, whatever the images; each may be multiplied by a trainable scale per channel."""

    def __init__(self, features, image_size, scaled=False):
        super().__init__()
        self.features = features
        self.shapes = {
            f"level{i}": FeatureShape(x.shape[1], image_size[0] // x.shape[2]) for i, x in enumerate(features)
        }
        for i, x in enumerate(features if scaled else ()):
            scale = nn.Parameter(torch.linspace(0.5, 1.5, x.shape[1])[None, :, None, None])
            self.register_parameter(f"scale{i}", scale)

    def output_shape(self):
        return self.shapes

    def forward(self, images):
        scales = [getattr(self, f"scale{i}", 1) for i in range(len(self.features))]
        return {name: x * s for name, x, s in zip(self.shapes, self.features, scales, strict=True)}


def build_network(config, backbone):
    """A DINO of the sizes of an official configuration, one pair of heads for all decoder layers."""
    width, levels, classes = config["hidden_dim"], config["num_feature_levels"], config["num_classes"]
    sizes = {
        "embed_dim": width,
        "num_heads": config["nheads"],
        "num_levels": levels,
        "hidden_dim": config["dim_feedforward"],
    }
    return DINO(
        neck=ChannelMapper(
            backbone=backbone, in_features=list(backbone.output_shape()), out_channels=width, num_levels=levels
        ),
        position_encoding=SinePositionEncoding(
            width, temperatures=(config["pe_temperatureH"], config["pe_temperatureW"])
        ),
        encoder=Encoder(num_layers=config["enc_layers"], num_points=config["enc_n_points"], **sizes),
        query_selection=QuerySelection(num_queries=config["num_queries"], num_classes=classes, embed_dim=width),
        denoising=RecordedDenoising(
            num_classes=classes,
            embed_dim=width,
            num_denoising=config["dn_number"],
            label_noise=config["dn_label_noise_ratio"],
            box_noise=config["dn_box_noise_scale"],
        ),
        decoder=share_heads(
            Decoder(num_classes=classes, num_layers=config["dec_layers"], num_points=config["dec_n_points"], **sizes)
        ),
    )


def build_criterion(config):
    return SetCriterion(
        matcher=HungarianMatcher(
            class_cost=config["set_cost_class"],
            l1_cost=config["set_cost_bbox"],
            giou_cost=config["set_cost_giou"],
            alpha=config["focal_alpha"],
        ),
        class_weight=config["cls_loss_coef"],
        l1_weight=config["bbox_loss_coef"],
        giou_weight=config["giou_loss_coef"],
        alpha=config["focal_alpha"],
    )


def official_parameters(model, official):
    """{official name: parameter}, where `official` is the state dict that the model's weights came from.

    Each official array is replaced by its index, which then tells where `convert` puts it. Shared heads go by the
    name that `named_parameters` of the official program gives them.
    """
    names = [name for name in official if canonical_name(name) not in official or canonical_name(name) == name]
    tags = {name: torch.full_like(official[name], i) for i, name in enumerate(names)}
    places = {own: names[int(tag.flatten()[0])] for own, tag in convert(tags).items()}
    return {canonical_name(places[own]): parameter for own, parameter in model.named_parameters()}


def canonical_name(name):
    return f"transformer.decoder.{name}" if name.startswith(("bbox_embed.", "class_embed.")) else name


def layer_parts(prefix, layers):
    """Official names of the decoder layers' predictions, first layer first."""
    return [f"{prefix}aux{i}" for i in range(layers - 1)] + [f"{prefix}main"]


def check_outputs(golden, case, outputs):
    """Compare all predictions that the file has of this case."""
    layers = len(outputs.decoder.logits)
    parts = dict(zip(layer_parts("", layers), zip(*outputs.decoder, strict=True), strict=True))
    parts["interm"] = (outputs.proposals.logits[0], outputs.proposals.boxes[0])
    if outputs.denoising:
        noised = zip(*outputs.denoising.predictions, strict=True)
        parts |= dict(zip(layer_parts("dn_", layers), noised, strict=True))
    for name in golden.below(f"{case}/out/"):
        part, kind = name.split("/")
        golden.check(f"{case}/out/{name}", parts[part][kind == "pred_boxes"])


def check_losses(golden, case, losses, weights):
    """Compare each loss, without its weight; denoising losses that we do not have must be 0 there."""
    absent = set(weights) - set(losses)
    assert set(losses) <= set(weights)
    assert not absent or absent == {key for key in weights if "_dn" in key}
    for key, weight in weights.items():
        golden.check(f"{case}/loss/{key}", losses[key] / weight if key in losses else torch.tensor(0.0))


def check_matches(golden, case, outputs, matcher, targets):
    parts = layer_parts("", len(outputs.decoder.logits))
    layers = dict(zip(parts, matcher(outputs.decoder, targets), strict=True))
    layers["interm"] = matcher(outputs.proposals, targets)[0]
    for part, images in layers.items():
        for image, (query, target) in enumerate(images):
            golden.check(f"{case}/match/{part}/src{image}", query)
            golden.check(f"{case}/match/{part}/tgt{image}", target)
