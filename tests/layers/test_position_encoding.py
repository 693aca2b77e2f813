import math

import pytest
import torch

from dino.layers import SinePositionEncoding
from dino.layers.position_encoding import encode_boxes


def sine_by_hand(angle, dim, temperature):
    periods = [temperature ** (2 * (i // 2) / dim) for i in range(dim)]
    return [math.cos(angle / p) if i % 2 else math.sin(angle / p) for i, p in enumerate(periods)]


def position_by_hand(padding, dim, temperatures, offset):
    """One mask as nested lists -> (2*dim, H, W) as nested lists."""
    height, width = len(padding), len(padding[0])
    code = [[None] * width for _ in range(height)]
    for i in range(height):
        for j in range(width):
            rows = sum(not padding[r][j] for r in range(i + 1))
            columns = sum(not padding[i][c] for c in range(j + 1))
            of_rows = sum(not padding[r][j] for r in range(height))
            of_columns = sum(not padding[i][c] for c in range(width))
            y = (rows + offset) / (of_rows + 1e-6) * 2 * math.pi
            x = (columns + offset) / (of_columns + 1e-6) * 2 * math.pi
            code[i][j] = sine_by_hand(y, dim, temperatures[0]) + sine_by_hand(x, dim, temperatures[1])
    return torch.tensor(code, dtype=torch.float64).permute(2, 0, 1)


@pytest.mark.parametrize(("temperatures", "offset"), [((20, 20), 0), ((20, 50), 0), ((10000, 10000), -0.5)])
def test_against_loops(temperatures, offset):
    padding = torch.zeros(2, 5, 6, dtype=torch.bool)
    padding[1, 4:] = True
    padding[1, :, 3:] = True
    encoding = SinePositionEncoding(16, temperatures=temperatures, offset=offset)(padding)
    for code, mask in zip(encoding.double(), padding, strict=True):
        expected = position_by_hand(mask.tolist(), 8, temperatures, offset)
        torch.testing.assert_close(code[:, ~mask], expected[:, ~mask], rtol=0, atol=2e-6)


def test_published_values():
    padding = torch.zeros(1, 3, 4, dtype=torch.bool)
    padding[:, -1] = True
    padding[:, :, -1] = True
    code = SinePositionEncoding(256)(padding)[0]
    corner = torch.tensor([1.3e-6, -1.0, 0.143172, -0.989698])
    torch.testing.assert_close(code[:4, 0, 0], corner, rtol=0, atol=2e-6)
    corner = torch.tensor([0.866026, -0.499999, 0.909871, -0.414890])
    torch.testing.assert_close(code[128:132, 0, 0], corner, rtol=0, atol=2e-6)
    torch.testing.assert_close(code[2:4, 1, 2], torch.tensor([-0.283393, 0.959004]), rtol=0, atol=2e-6)
    # Column 3 holds padding only: it counts 0 rows, so y is coded as sine and cosine of 0.
    torch.testing.assert_close(code[:128, 0, 3], torch.tensor([0.0, 1.0] * 64))


def test_box_code_published_values():
    code = encode_boxes(torch.tensor([0.25, 0.5, 0.1, 0.2]), 128)
    assert code.shape == (512,)
    y, x = [0.0, -1.0, 0.408751, -0.912646], [1.0, 0.0, 0.977918, 0.208991]
    torch.testing.assert_close(code[:4], torch.tensor(y), rtol=0, atol=1e-6)
    torch.testing.assert_close(code[128:132], torch.tensor(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(code[256:258], torch.tensor([0.587785, 0.809017]), rtol=0, atol=1e-6)
    torch.testing.assert_close(code[384:386], torch.tensor([0.951057, 0.309017]), rtol=0, atol=1e-6)


def test_box_code_against_loops():
    box = [0.31, 0.77, 0.12, 0.45]
    expected = [sine_by_hand(box[i] * 2 * math.pi, 10, 10000) for i in (1, 0, 2, 3)]
    code = encode_boxes(torch.tensor(box), 10).double()
    torch.testing.assert_close(code, torch.tensor(expected, dtype=torch.float64).flatten(), rtol=0, atol=2e-6)
