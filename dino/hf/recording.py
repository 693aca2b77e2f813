"""What the parts of a network return while it runs, for outputs of a model that the network itself does not return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dino.layers.deform_attn import MultiScaleDeformableAttention
from dino.modeling import DINO
from dino.structures import Outputs

_Run = dict[str, list]

_RUN: ContextVar[tuple[Recorder, _Run] | None] = ContextVar("run", default=None)  # of this thread


class Recorder:
    """Keeps what parts of a network return, by hooks that do nothing outside of `record`.

    Args:
        network: gets the hooks.
    """

    def __init__(self, network: DINO):
        self.compiled_run: _Run | None = None  # of a compiled graph, which can't set a `ContextVar`
        encoder, decoder = network.encoder, network.decoder
        encoder.register_forward_hook(self._keep_encoder)
        network.query_selection.register_forward_hook(partial(self._keep, "selection"))
        decoder.register_forward_hook(partial(self._keep_input, "decoder_input"))
        decoder.norm.register_forward_hook(partial(self._keep, "decoder_states"))
        for part, name in ((encoder, "encoder"), (decoder, "decoder")):
            for layer in part.layers:
                layer.register_forward_hook(partial(self._keep, f"{name}_layers"))
            for module in part.modules():
                self._watch_attention(module, name)

    def _watch_attention(self, module: nn.Module, name: str) -> None:
        """Hook a module that is an attention."""
        if isinstance(module, MultiScaleDeformableAttention):
            shape = (module.num_heads, module.num_levels, module.num_points)
            module.attention_weights.register_forward_hook(partial(self._keep_points, f"{name}_reads", shape))
        elif isinstance(module, nn.MultiheadAttention):
            module.register_forward_hook(partial(self._keep_pairs, f"{name}_pairs"))

    @contextmanager
    def record(self, attentions: bool) -> Iterator[_Run]:
        """Context where the hooks of this thread fill the dict that it gives.

        Args:
            attentions: whether the weights of attention are kept too, without gradient: they are computed apart.
        """
        run: _Run = {"attentions": [attentions]}
        if torch.compiler.is_compiling():
            self.compiled_run = run
            try:
                yield run
            finally:
                self.compiled_run = None
            return
        token = _RUN.set((self, run))
        try:
            yield run
        finally:
            _RUN.reset(token)

    def _run(self) -> _Run | None:
        """What hooks fill; None outside of `record`."""
        if self.compiled_run is not None:
            return self.compiled_run
        found = _RUN.get()
        return found[1] if found is not None and found[0] is self else None

    def _add(self, name: str, value: Any) -> None:
        run = self._run()
        if run is not None:
            run.setdefault(name, []).append(value)

    def _wants_attentions(self) -> bool:
        run = self._run()
        return run is not None and run["attentions"][0]

    def _keep(self, name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        self._add(name, output)

    def _keep_input(self, name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        self._add(name, inputs[0])

    def _keep_encoder(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self._add("tokens", inputs[0])
        self._add("memory", output)

    def _keep_points(self, name: str, shape: tuple, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        """Logits (B, Q, M*L*P) -> weights (B, Q, M, L, P) of the points that each query reads."""
        if self._wants_attentions():
            heads, levels, points = shape
            weights = output.detach().unflatten(-1, (heads, levels * points)).softmax(-1)
            self._add(name, weights.unflatten(-1, (levels, points)))

    def _keep_pairs(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        """Weights (B, M, Q, Q) with which queries read each other: what they read where the values are unit vectors."""
        if self._wants_attentions():
            x, position, attend = inputs
            with torch.no_grad():
                module.forward(x, position, partial(self._read_units, name, attend))

    def _read_units(self, name: str, attend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        units = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
        self._add(name, attend(q, k, units))
        return v


def states_of(run: _Run, outputs: Outputs) -> dict[str, Tensor | None]:
    """The fields of a model's output that every forward has."""
    layers, _, queries, _ = outputs.decoder.boxes.shape
    states = torch.stack([x[:, -queries:] for x in run["decoder_states"][:layers]], 1)  # (B, N, Q, E)
    box_logits = run["selection"][0][0].box_logits
    has_proposals = len(outputs.proposals.logits) > 0
    return {
        "last_hidden_state": states[:, -1],
        "init_reference_points": box_logits.sigmoid(),
        "intermediate_hidden_states": states,
        "intermediate_reference_points": outputs.decoder.boxes.transpose(0, 1),
        "intermediate_logits": outputs.decoder.logits.transpose(0, 1),
        "encoder_last_hidden_state": run["memory"][0].features,
        "enc_outputs_class": outputs.proposals.logits[0] if has_proposals else None,
        "enc_outputs_coord_logits": box_logits if has_proposals else None,
    }


def hidden_states_of(run: _Run, outputs: Outputs) -> dict[str, tuple[Tensor, ...]]:
    """The fields that `output_hidden_states` adds."""
    layers, _, queries, _ = outputs.decoder.boxes.shape
    decoder = [run["decoder_input"][0].content, *run["decoder_layers"][:layers]]
    return {
        "encoder_hidden_states": (run["tokens"][0].features, *run.get("encoder_layers", ())),
        # the layer's own tensor where nothing is denoised: a view would keep no gradient for `retain_grad`
        "decoder_hidden_states": tuple(x if x.shape[1] == queries else x[:, -queries:] for x in decoder),
    }


def attentions_of(run: _Run, outputs: Outputs) -> dict[str, tuple[Tensor, ...]]:
    """The fields that `output_attentions` adds."""
    layers, _, queries, _ = outputs.decoder.boxes.shape
    return {
        "encoder_attentions": tuple(run.get("encoder_reads", ())),
        "cross_attentions": tuple(x[:, -queries:] for x in run["decoder_reads"][:layers]),
        "decoder_attentions": tuple(x[:, :, -queries:, -queries:] for x in run["decoder_pairs"][:layers]),
    }
