"""torch.compile: the parts are one graph each, and one graph serves images of any size."""

import pytest
import torch

from ..tiny import random_batch, tiny_network


@pytest.mark.parametrize("part", ["neck", "encoder", "decoder"])
def test_one_graph_for_all_sizes(part):
    """`fullgraph` refuses a break in the graph; other sizes must not make another graph."""
    model, graphs = tiny_network(num_layers=1).eval(), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model.get_submodule(part), fullgraph=True, dynamic=True, backend=keep)
    with torch.no_grad():
        for height, width in ((136, 200), (200, 136), (264, 328)):
            inputs = inputs_of(model, part, *random_batch(2, height, width))
            torch.testing.assert_close(compiled(*inputs), model.get_submodule(part)(*inputs))
    assert len(graphs) == 1


def inputs_of(model, part, images, padding):
    """What `part` is called with for a batch."""
    if part == "neck":
        return (images,)
    tokens = model.tokenize(model.neck(images), padding)
    if part == "encoder":
        return (tokens,)
    memory = model.encoder(tokens)
    return (model.query_selection(memory)[0], memory)
