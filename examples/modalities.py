"""A module in a network, several heads, three modalities and five: `python examples/modalities.py`."""

from __future__ import annotations

import numpy as np

import tattn
from tattn.paper import TrainingProblem, loss_gradient, loss_gradient_factors, weight_gradients


def main() -> None:
    """Gradients of one module, and two ways to attend to four further modalities."""
    rng = np.random.default_rng(0)

    # Three modalities of their own lengths and widths: text attends to all pairs (image patch, audio frame).
    text, image, audio = (rng.uniform(-1, 1, shape) for shape in ((200, 12), (400, 16), (300, 10)))
    # Four heads of 3 channels: weights have a leading dimension, inputs are shared.
    x1, x2, x3 = (rng.normal(size=(4, width, 3)) / width for width in (12, 16, 10))
    y1, y2 = (rng.normal(size=(4, width, 3)) / width**0.5 for width in (16, 10))
    target = rng.normal(size=(200, 3))
    problem = TrainingProblem(text, image, audio, image, audio, target, x1, x2, x3, y1, y2)
    result = loss_gradient(problem, eps=1e-2)
    print(f"gradient {result.gradient.shape} for 4 heads, each entry within {result.error:.1e}")
    print(result.plan)

    # One module of a network: the gradient that arrives for its output in place of output − E.
    upstream = rng.normal(size=(4, 200, 3)) / 200
    module = weight_gradients(problem, upstream=upstream)
    print("weights of the module:", {name: array.shape for name, array in module._asdict().items()})
    factors = loss_gradient_factors(problem, eps=1e-3, upstream=upstream)
    print(f"the gradient for X as three factors of {factors.t1.shape[-1]} columns, within {factors.error:.1e}")

    # Text and four more modalities: one attention of order five, or two layers of order three.
    first, *others = (rng.uniform(-1, 1, (n, 3)) for n in (200, 60, 50, 40, 30))
    together = tattn.tensor_attention(first, others, others)
    layer = tattn.tensor_attention(first, others[:2], others[:2])
    layers = tattn.tensor_attention(layer, others[2:], others[2:])
    print(f"five modalities: {together.shape} at order five, {layers.shape} by two layers of order three")


if __name__ == "__main__":
    main()
