"""Layers in calibrated integers against arithmetic written out by hand: a small detector, gradients and training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fpsim.posttraining import fold_batch_norms, round_layers
from tests.shared.plain_numbers import integers


class Block(nn.Module):
    """A convolution, its normalization, and an activation function, as in the backbones of detectors."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Detector(nn.Module):
    """A residual backbone, an upsampling, and two heads: classes and boxes for every place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = Block(2, 4), Block(4, 4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.classes, self.boxes = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = torch.relu(self.up(x + self.body(x)))
        return self.classes(x), self.boxes(x)


@pytest.fixture
def model() -> Detector:
    torch.manual_seed(0)
    model = Detector()
    for _ in range(3):
        model(2 * torch.randn(4, 2, 6, 6) + 1)
    return model.eval()


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def in_channels(weight: Tensor, axis: int = 0) -> Tensor:
    """A weight in int8 with a ratio for each output channel."""
    moved = weight.detach().movedim(axis, 0)
    rounded = integers(moved.reshape(len(moved), -1).numpy(), 8)
    return torch.from_numpy(rounded).reshape(moved.shape).movedim(0, axis)


def in_range(x: Tensor, ratio: float) -> Tensor:
    """Activations in int8 with this ratio."""
    ratio = np.float32(ratio)
    return torch.from_numpy(np.clip(np.rint(x.detach().numpy() / ratio), -127, 127).astype(np.float32) * ratio)


def test_the_prepared_model_multiplies_integers(model: Detector) -> None:
    fold_batch_norms(model, [images()])
    weights = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "weight")
    }
    ratios = round_layers(model, [images(1), images(2)])
    x = 1.5 * images(3)  # beyond the range of the batches
    assert ratios["stem.conv"] == np.float32(max(images(s).abs().max() for s in (1, 2))) / np.float32(127)
    assert list(ratios) == ["stem.conv", "body.conv", "up", "classes", "boxes"]

    def conv(name: str, x: Tensor, padding: int = 0) -> Tensor:
        return functional.conv2d(
            in_range(x, ratios[name]), in_channels(weights[name]), model.get_submodule(name).bias, padding=padding
        )

    stem = torch.relu(conv("stem.conv", x, 1))
    body = stem + torch.relu(conv("body.conv", stem, 1))
    up = functional.conv_transpose2d(
        in_range(body, ratios["up"]), in_channels(weights["up"], 1), model.up.bias, stride=2
    )
    want = conv("classes", torch.relu(up)), conv("boxes", torch.relu(up))
    for got, expected in zip(model(x), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"weight of stem\.conv is parametrized already"):
        round_layers(model, [images()])


def test_derivatives_pass_straight_through_and_stop_at_the_range() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    weight = layer.weight
    round_layers(layer, [torch.tensor([[1.0, -2.0, 0.5]])])
    x = torch.tensor([[1.9, -2.5, 0.3], [0.1, 0.2, -1.0]], requires_grad=True)
    gradient = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    layer(x).backward(gradient)
    inside = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    assert torch.equal(x.grad, (gradient @ in_channels(weight)) * inside)
    assert torch.equal(weight.grad, gradient.T @ in_range(x, 2 / 127))


def test_a_step_moves_the_unrounded_weight_and_the_next_call_rounds_it(model: Detector) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    before, x = layer.weight.detach().clone(), torch.tensor([[1.0, -2.0, 0.5]])
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    round_layers(layer, [x], weight="int8/row")
    layer(x).sum().backward()
    optimizer.step()
    moved = before - 0.5 * in_range(x, 2 / 127).expand(2, 3)
    assert torch.equal(layer.parametrizations.weight.original, moved)
    assert torch.equal(layer.weight, in_channels(moved))
    round_layers(model, [images()])
    state = model.state_dict()
    assert "up.parametrizations.weight.original" in state and "up.rounded_input.ratio" in state
    other = Detector().eval()
    round_layers(other, [3 * images()])
    other.load_state_dict(state)
    assert torch.equal(other(images())[0], model(images())[0])


class TestFolding:
    def test_the_model_computes_the_same_and_has_no_normalization(self, model: Detector) -> None:
        want = model(images(4))
        assert fold_batch_norms(model, [images()]) == {"stem.conv": "stem.norm", "body.conv": "body.norm"}
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        for got, expected in zip(model(images(4)), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    def test_a_convolution_whose_output_is_used_twice_is_refused(self) -> None:
        class Twice(Block):
            def forward(self, x: Tensor) -> Tensor:
                x = self.conv(x)
                return self.norm(x) + x

        torch.manual_seed(0)
        model = Twice(2, 3)
        model(5 + 3 * images())
        model.eval()
        want = model(images())
        with pytest.raises(ValueError, match="used elsewhere too"):
            fold_batch_norms(model, [images()])
        assert torch.equal(model(images()), want) and isinstance(model.norm, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "int8/row"}, "unknown format 'int8/row'"),
        ({"activation": "mxfp8"}, "unknown format 'mxfp8'"),
        ({"activation": "uint8"}, "a signed format"),
        ({"weight": "none"}, "rounds nothing"),
        ({"weight": "int8/row/stochastic"}, "nearest values"),
        ({"skip": "head"}, "matches no layer"),
        ({"skip": "*"}, "no layer is left"),
        ({"batches": []}, "no batch"),
        ({"batches": [torch.full((1, 2, 6, 6), torch.inf)], "fold": False}, r"input of stem\.conv has an infinity"),
    ],
)
def test_wrong_arguments_are_named(model: Detector, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        round_layers(model, **{"batches": [images()], **arguments})
