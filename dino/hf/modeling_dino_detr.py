"""DINO as a model of transformers: a thin adapter around the network of this project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from dino.layers import HungarianMatcher, SetCriterion
from dino.modeling import DINO
from dino.modeling.blocks import find_blocks
from dino.modeling.detector import IMAGENET_MEAN
from dino.modeling.variants.criteria import FinalCriterion, check_criterion
from dino.structures import Outputs, Target
from dino.training.memory_saving import checkpoint_activations
from dino.utils.device import to_device
from dino.utils.files import DataError, UserError
from dino.weights.addresses import locate
from dino.weights.loading import first_names, load_weights
from dino.weights.network_parts import build_network
from dino.weights.size_check import SizeGuard

from .configuration_dino_detr import DinoDetrConfig
from .loading_check import guard_of_files, loading_from
from .recording import Recorder, attentions_of, hidden_states_of, states_of

_logger = logging.get_logger(__name__)
_REGISTER = nn.Module.register_parameter
_INITS = {name: value for name, value in vars(nn.init).items() if name.endswith("_") and callable(value)}
# Stands for the weights of the largest network that a config may ask for: two thousand million numbers.
_LARGEST = {str(i): torch.empty(2**20, device="meta") for i in range(1000)}
_OUTSIDE = 0.01  # of the image, by which rounded boxes may leave it


@dataclass
class _Predictions(ModelOutput):
    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None


@dataclass
class _States(ModelOutput):
    last_hidden_state: Tensor | None = None
    init_reference_points: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    intermediate_reference_points: Tensor | None = None
    intermediate_logits: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    enc_outputs_class: Tensor | None = None
    enc_outputs_coord_logits: Tensor | None = None


@dataclass
class DinoDetrModelOutput(_States):
    """What `DinoDetrModel` returns. B images, Q queries, C classes, E channels, S tokens, N layers of the decoder.

    Args:
        last_hidden_state: (B, Q, E), the queries after the last layer and the decoder's norm.
        init_reference_points: (B, Q, 4), the boxes of the selected tokens, which the decoder refines.
        intermediate_hidden_states: (B, N, Q, E), the queries after each layer and the norm, as the heads read them.
        intermediate_reference_points: (B, N, Q, 4), the boxes after each layer.
        intermediate_logits: (B, N, Q, C), the class logits after each layer.
        decoder_hidden_states: N + 1 times (B, Q, E): the contents of the queries, and the state after each layer,
            before the norm.
        decoder_attentions: N times (B, M, Q, Q).
        cross_attentions: N times (B, Q, M, L, P), the weights of the points that each query reads. Attentions have no
            gradient.
        encoder_last_hidden_state: (B, S, E).
        encoder_hidden_states: (B, S, E) before the first and after each layer of the encoder.
        encoder_attentions: (B, S, M, L, P) of each layer of the encoder.
        enc_outputs_class: (B, Q, C), the encoder's class logits of the selected tokens.
        enc_outputs_coord_logits: (B, Q, 4), the boxes of the selected tokens before the sigmoid.
        network_outputs: all that the losses are computed from, and the targets; with `labels` only.
    """

    network_outputs: tuple[Outputs, list[Target]] | None = None


@dataclass
class DinoDetrObjectDetectionOutput(_States, _Predictions):
    """What `DinoDetrForObjectDetection` returns. All fields that are not named here: see `DinoDetrModelOutput`.

    Args:
        loss: scalar, the sum of the weighted losses; with `labels` only.
        loss_dict: the weighted losses by name, see `SetCriterion`; with `labels` only.
        logits: (B, Q, C), the class logits of the last layer, before the sigmoid.
        pred_boxes: (B, Q, 4) float32, (cx, cy, w, h) as fractions of the unpadded image.
        auxiliary_outputs: dicts of `logits` and `pred_boxes` of all layers but the last; with `labels` and
            `auxiliary_loss` only.
    """


class DinoDetrPreTrainedModel(PreTrainedModel):
    """What the models of this file have in common: initialisation, loading and saving."""

    config_class = DinoDetrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["TorchvisionBackbone", "TimmBackbone", "_EncoderLayer", "DecoderLayer"]  # noqa: RUF012

    def tie_weights(self, *arguments: Any, **options: Any) -> None:
        """Nothing is tied; transformers calls this when weights have been loaded or initialised."""
        super().tie_weights(*arguments, **options)
        self.base_model.finish_loading()

    def _init_weights(self, module: nn.Module) -> None:
        """Give a module's own tensors the values of a new network, except for loaded ones."""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        lacking = [(name, x) for name, x in own if not (x.is_meta or getattr(x, "_is_hf_initialized", False))]
        new = self.base_model.new_module(module) if lacking else None
        if new is not None:
            for name, tensor in lacking:
                tensor.data.copy_(getattr(new, name))

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **options: Any) -> None:
        """Switch it on or off, for `gradient_checkpointing_enable`; always by the way that is not reentrant.

        Raises:
            ValueError: it is asked for in some of the blocks only.
        """
        if options.get("every_n_layers", 1) != 1:
            raise UserError("every_n_layers must be 1: all blocks are recomputed, or none")
        self.base_model.recompute(enable)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """Load a model, see transformers. Its network must not be larger than the weights in the files."""
        with loading_from(pretrained_model_name_or_path, options):
            return super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing, see `SavesRemoteCode`."""

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Save the model into a folder, see transformers. The folder never asks for a backbone's weights.

        Raises:
            ValueError: the config got other labels than the network was built for, so that nothing could load it.
        """
        config, built = self.config, self.base_model.num_labels
        if config.num_labels != built:
            raise UserError(
                f"the config has {config.num_labels} labels, but the network {built}. Load the folder with the new "
                "labels: from_pretrained(FOLDER, id2label=…, label2id=…, ignore_mismatched_sizes=True)"
            )
        changed = config.without_pretrained_backbone()
        kept = {name: getattr(config, name) for name in changed}
        try:
            config.update(changed)
            super().save_pretrained(*arguments, **options)
        finally:
            config.update(kept)


class DinoDetrModel(DinoDetrPreTrainedModel):
    """The network, with hidden states and attentions where they are asked for.

    Args:
        config: of the network. With `use_pretrained_backbone`, a new model starts with the backbone's published
            weights.

    Raises:
        ValueError: a field of the config has a value that no DINO has, or the backbone's weights can't be read.
    """

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        config.follow_labels()
        is_new = not nn.LayerNorm(1).weight.is_meta  # else weights are loaded later
        network = _build(config, None if is_new else guard_of_files(config.num_labels))
        if is_new and config.use_pretrained_backbone:
            _load_backbone(network, config)
        self._shared = {name: first for name, first in first_names(network).items() if name != first}
        self._frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
        self._new: dict[nn.Module, nn.Module] | None = {} if is_new else None  # module -> the same of a new network
        self._recorder = Recorder(network)
        self.num_labels = config.num_labels  # of the network; the config's can be set
        self.network = network.to(torch.empty(0).device, torch.get_default_dtype())
        self.gradient_checkpointing = False
        self.register_load_state_dict_pre_hook(_repeat_shared)
        self.post_init()

    def new_module(self, module: nn.Module) -> nn.Module | None:
        """The same module of a new network with random weights; None where the model itself is new."""
        if self._new is None:
            self._new = dict(zip(self.network.modules(), _build(self.config).modules(), strict=True))
        return self._new.get(module)

    def finish_loading(self) -> None:
        """Undo what loading does to parameters: it makes all of them trainable, and gives them the usual layout."""
        self._new = None
        self.network.neck.to(memory_format=torch.channels_last)
        for name, parameter in self.network.named_parameters():
            if name in self._frozen:
                parameter.requires_grad_(False)

    def state_dict(self, *arguments: Any, prefix: str = "", **options: Any) -> dict[str, Tensor]:
        """The tensors by name. Those that several layers share are there once, under the first layer's name."""
        state = super().state_dict(*arguments, prefix=prefix, **options)
        for name in self._shared:
            state.pop(f"{prefix}network.{name}", None)
        return state

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DinoDetrModelOutput | tuple:
        """Run the network.

        Args:
            pixel_values: (B, 3, H, W), normalised, zero where padded.
            pixel_mask: (B, H, W), 1 where an image is, 0 where it is padded; None where nothing is.
            labels: the objects of each image, see `DinoDetrForObjectDetection.forward`. In training, they are denoised.
            output_attentions, output_hidden_states, return_dict: as in all models of transformers.

        Raises:
            ValueError: an argument has another shape, or labels can't be used.
        """
        attentions = _or_else(output_attentions, self.config.output_attentions)
        hidden = _or_else(output_hidden_states, self.config.output_hidden_states)
        images, padding = _read_images(pixel_values, pixel_mask, self.network.level_embed)
        targets = None if labels is None else _read_labels(labels, images, self.config.num_labels)
        with self._recorder.record(attentions) as run:
            outputs = self.network(images, padding, targets if self.training else None)
        found = DinoDetrModelOutput(
            **states_of(run, outputs),
            **(hidden_states_of(run, outputs) if hidden else {}),
            **(attentions_of(run, outputs) if attentions else {}),
            network_outputs=None if targets is None else (outputs, targets),
        )
        return found if _or_else(return_dict, self.config.return_dict) else found.to_tuple()

    def recompute(self, enable: bool) -> None:
        """Recompute the activations of all blocks in the backward pass instead of keeping them; or no longer."""
        if enable and not self.gradient_checkpointing:
            checkpoint_activations(self, _parts_with_blocks(self.network))
        elif not enable:
            _unwrap(self.network)
        self.gradient_checkpointing = enable


class DinoDetrForObjectDetection(DinoDetrPreTrainedModel):
    """DINO with its losses.

    Args:
        config: of the network and the losses, see `DinoDetrModel`.

    Raises:
        ValueError: as of `DinoDetrModel`.
    """

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        self.model = DinoDetrModel(config)
        self.criterion = _make_criterion(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DinoDetrObjectDetectionOutput | tuple:
        """Detect; with labels, also compute the losses.

        In evaluation mode nothing is denoised, so there are no `loss_*_dn`.

        Args:
            pixel_values: (B, 3, H, W), normalised, zero where padded.
            pixel_mask: (B, H, W), 1 where an image is, 0 where it is padded; None where nothing is.
            labels: for each image a dict of `class_labels` (G,) int64, from 0 to `num_labels` - 1, and `boxes` (G, 4),
                (cx, cy, w, h) as fractions of the unpadded image, as the image processor makes them.
            output_attentions, output_hidden_states, return_dict: as in all models of transformers.

        Raises:
            ValueError: an argument has another shape, or labels can't be used; the message says which.
            FloatingPointError: a prediction is not finite, so that nothing can be matched.
        """
        found = self.model(pixel_values, pixel_mask, labels, output_attentions, output_hidden_states, True)
        outputs = DinoDetrObjectDetectionOutput(
            **({} if labels is None else self._losses(*found.network_outputs)),
            logits=found.intermediate_logits[:, -1],
            pred_boxes=found.intermediate_reference_points[:, -1],
            **{name: value for name, value in found.items() if name != "network_outputs"},
        )
        return outputs if _or_else(return_dict, self.config.return_dict) else outputs.to_tuple()

    @torch.compiler.disable  # matching runs on the host, in shapes that follow the number of objects
    def _losses(self, outputs: Outputs, targets: list[Target]) -> dict[str, Any]:
        """`loss`, `loss_dict` and `auxiliary_outputs`."""
        check_criterion(self.criterion, self.model.network)
        losses = self.criterion(outputs, targets)
        found = {"loss": sum(losses.values()), "loss_dict": losses}
        if isinstance(self.criterion, FinalCriterion):  # those of the other layers are 0
            return {**found, "loss_dict": {name: x for name, x in losses.items() if not name[-1].isdigit()}}
        earlier = zip(outputs.decoder.logits[:-1], outputs.decoder.boxes[:-1], strict=True)
        return {**found, "auxiliary_outputs": [{"logits": logits, "pred_boxes": boxes} for logits, boxes in earlier]}


@contextmanager
def _plain_construction() -> Iterator[None]:
    """Context where modules are made as without transformers: on the CPU, in float32, with initial values.

    While it loads weights, transformers makes a model without memory. Backbones here measure themselves by a forward
    pass when they are made.
    """
    dtype = torch.get_default_dtype()
    with torch.device("cpu"), patch.multiple(nn.init, **_INITS), patch.object(nn.Module, _REGISTER.__name__, _REGISTER):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _build(config: DinoDetrConfig, guard: SizeGuard | None = None) -> DINO:
    """Build the network of a config with random weights, on the CPU."""
    description = {"network": config.describe()}
    try:
        with _plain_construction(), guard or SizeGuard(_LARGEST):
            return build_network(description)
    except Exception as error:  # wrong arguments can raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise DataError(f"can't build the network of this config: {kind}{str(error)[:1000]}") from error


def _load_backbone(network: DINO, config: DinoDetrConfig) -> None:
    """Load the published weights of a config's backbone, or those of its file."""
    library = "timm://{}" if config.use_timm_backbone else "torchvision://{}/IMAGENET1K_V1"
    address = config.backbone_checkpoint or library.format(config.backbone)
    try:
        load_weights(network, locate(str(address)), parts="backbone")
    except UserError as error:
        raise UserError(
            f"{error}. Or give the config backbone_checkpoint=FILE with the weights of {config.backbone}, or "
            "use_pretrained_backbone=False for random ones"
        ) from error
    expected = getattr(network.neck.backbone, "pixel_statistics", {})
    mean = expected.get("pixel_mean", IMAGENET_MEAN)
    if max(abs(a - b) for a, b in zip(mean, IMAGENET_MEAN, strict=True)) > 0.1:
        stated = ", ".join(f"image_{name[6:]}={[round(x / 255, 4) for x in x]}" for name, x in expected.items())
        _logger.warning(f"{config.backbone} expects other images than ImageNet's: give the image processor {stated}")


def _repeat_shared(model: DinoDetrModel, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Let the model load what it saves: a shared tensor has one name there."""
    for name, first in model._shared.items():
        if f"{prefix}network.{first}" in state:
            state.setdefault(f"{prefix}network.{name}", state[f"{prefix}network.{first}"])


def _parts_with_blocks(network: DINO) -> list[str]:
    """Parts whose activations can be recomputed block by block."""
    try:
        find_blocks(network.neck.backbone)
    except ValueError:
        return ["encoder", "decoder"]
    return ["backbone", "encoder", "decoder"]


def _unwrap(module: nn.Module) -> None:
    """Replace the wrappers of `checkpoint_activations` by what they wrap."""
    for name, child in module.named_children():
        if isinstance(child, CheckpointWrapper):
            setattr(module, name, child._checkpoint_wrapped_module)
        else:
            _unwrap(child)


def _make_criterion(config: DinoDetrConfig) -> SetCriterion:
    """The losses of a config."""
    alpha = config.focal_alpha
    costs = {"class_cost": config.class_cost, "l1_cost": config.bbox_cost, "giou_cost": config.giou_cost}
    return (SetCriterion if config.auxiliary_loss else FinalCriterion)(
        matcher=HungarianMatcher(**costs, alpha=alpha),
        class_weight=config.cls_loss_coefficient,
        l1_weight=config.bbox_loss_coefficient,
        giou_weight=config.giou_loss_coefficient,
        alpha=alpha,
    )


def _or_else(given: bool | None, default: bool | None) -> bool:
    return bool(default if given is None else given)


def _read_images(pixel_values: Tensor, pixel_mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Check the images -> the arguments of the network, in the dtype of `like`."""
    _check_pixels(pixel_values)
    images = pixel_values.to(like.dtype)
    if pixel_mask is None:
        return images, None
    expected = (len(images), *images.shape[2:])
    if not isinstance(pixel_mask, Tensor) or pixel_mask.shape != expected:
        raise DataError(f"pixel_mask must be {expected}, as pixel_values, not {_name_kind(pixel_mask)}")
    padding = ~pixel_mask.bool()
    if padding.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return images, padding  # reading it would wait for the device
    if padding.flatten(1).all(1).any():
        raise DataError("pixel_mask is 0 all over an image: it must be 1 in the image and 0 in the padding")
    return images, padding if padding.any() else None  # None: faster


def _check_pixels(pixel_values: Any) -> None:
    """Raise a DataError unless these are images as the image processor makes them."""
    shape = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else ()
    if len(shape) != 4 or shape[1] != 3 or 0 in shape or not pixel_values.is_floating_point():
        raise DataError(
            f"pixel_values must be (B, 3, H, W), not {_name_kind(pixel_values)}: normalised images, as the image "
            'processor makes them, called with return_tensors="pt"'
        )


def _name_kind(value: Any) -> str:
    """What an argument is, for a message."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)}" if value.is_floating_point() else f"{tuple(value.shape)} {value.dtype}"


@torch.compiler.disable
def _read_labels(labels: Any, images: Tensor, num_labels: int) -> list[Target]:
    """Check the labels of a batch, in one device sync -> targets on the device of the images."""
    if not isinstance(labels, Sequence) or len(labels) != len(images):
        raise DataError(f"labels must be a list of {len(images)} dicts, one for each image")
    targets = [_read_objects(label, f"labels[{i}]", images.device) for i, label in enumerate(labels)]
    _check_values(targets, num_labels)
    return targets


def _check_values(targets: list[Target], num_labels: int) -> None:
    """Raise a DataError for labels that the model lacks, or for boxes that are no fractions of an image."""
    indices = [i for i, target in enumerate(targets) if len(target.labels)]
    ends = [_ends_of(targets[i]) for i in indices]
    for i, (first, last, low, high, side) in zip(indices, torch.stack(ends).tolist() if ends else [], strict=True):
        if not 0 <= first <= last < num_labels:
            raise DataError(
                f"labels[{i}]: class_labels go from {first:.0f} to {last:.0f}, but the model has the labels 0 to "
                f"{num_labels - 1}. Give the image processor the category_ids of the data set, or the model num_labels"
            )
        if not -_OUTSIDE <= low <= high <= 1 + _OUTSIDE or side < 0:
            raise DataError(
                f"labels[{i}]: boxes go from {low:g} to {high:g}, but (cx, cy, w, h) as fractions of the image were "
                "expected, from 0 to 1. The image processor makes them of a data set's pixels"
            )


def _ends_of(target: Target) -> Tensor:
    """(5,) first and last label, smallest and largest number of the boxes, smallest side."""
    ends = [*target.labels.float().aminmax(), *target.boxes.aminmax(), target.boxes[:, 2:].min()]
    return torch.stack(ends)


def _read_objects(label: Any, name: str, device: torch.device) -> Target:
    """Check the shapes of an image's labels."""
    classes, boxes = _read_label(label, name)
    count = classes.numel()
    whole = not count or not (classes.is_floating_point() or classes.is_complex())
    if classes.ndim != 1 or not whole or (boxes.shape != (count, 4) and boxes.numel() + count > 0):
        raise DataError(
            f"{name}: class_labels must be (G,) whole numbers and boxes (G, 4), but they are {tuple(classes.shape)} "
            f"{classes.dtype} and {tuple(boxes.shape)}"
        )
    return Target(to_device(classes, device, torch.int64), to_device(boxes.reshape(-1, 4), device, torch.float32))


def _read_label(label: Any, name: str) -> tuple[Tensor, Tensor]:
    """`class_labels` and `boxes` of an image, of any shapes."""
    if not isinstance(label, Mapping) or not {"class_labels", "boxes"} <= label.keys():
        raise DataError(f"{name} must be a dict of class_labels and boxes, as the image processor makes it")
    try:
        return torch.as_tensor(label["class_labels"]), torch.as_tensor(label["boxes"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{name}: class_labels and boxes must be tensors: {str(error)[:200]}") from error
