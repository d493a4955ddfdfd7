"""What to write instead of an operation that has no counterpart in a runtime."""

from __future__ import annotations

import re
from collections.abc import Mapping

_INSTEAD: Mapping[str, str] = {
    r"by a mask|nonzero|masked_select|unique|bincount|masked_scatter|repeat_interleave":
        "How many there are depends on values: use torch.where(mask, x, 0) or weights of 0 and 1",
    r"adaptive_max_pool": "Give it a size that divides its input's, or use average pooling",
    r"_embedding_bag": "Use nn.Embedding and a sum or mean over the positions",
    r"_fft|fft_|stft|istft": "Compute spectra before they are columns, or multiply by a matrix of "
        "sines",
    r"linalg|cholesky|inverse|svd|qr|eig|logdet|_solve|triangular": "Compute it before rows become "
        "columns, or in the cloud; a fixed matrix can be a buffer",
    r"grid_sampler": "Use nn.Upsample, pooling or a convolution for resampling",
    r"rand|normal|multinomial|bernoulli|uniform|exponential|rrelu|poisson|geometric|cauchy":
        "Dropout is drawn by the device; give other random numbers as a column",
    r"complex|real|imag|polar|angle": "Keep real and imaginary parts as two float tensors",
    r"bfloat16|float8|quint|qint": "Use float32",
    r"ctc_loss": "Train with it in the cloud, or label each position and use cross-entropy",
    r"cdist|_pdist|_euclidean": "Write ((a[:, :, None] - b[:, None]) ** 2).sum(-1)",
    r"multi_margin|multilabel_margin": "Write it with clamp and sum, or use cross-entropy",
    r"cumprod|logcumsumexp|cummax|cummin": "Write it with cumsum, of logarithms for products",
    r"median|mode|kthvalue": "Use sort or topk and an index",
    r"heaviside": "It has no slope: write (x > 0).to(x.dtype)",
    r"floor_divide": "It has no slope: write torch.floor(x / y)",
    r"searchsorted|bucketize|histc": "Compare with all borders and sum: (x[..., None] > borders)",
    r"prod": "Write exp(log(x).sum()) for what is above 0, or multiply out",
    r"across rows": "Let each row be computed by itself: index, sum and reshape inside of a row",
    r"quantize": "Export the float module; the runtime's tools quantise the graph",
    r"lgamma|digamma|polygamma|special_|bessel|erfinv|i0": "Use an approximation by polynomials",
    r"unfold|col2im|im2col": "Use a convolution, or slices and torch.cat",
    r"_cudnn|mkldnn|_thnn": "Use the layer of torch.nn on the CPU",
}  # fmt: skip
OTHERWISE = "Write it with sums, products, convolutions, activations and indices of torch"


def instead(operation: str) -> str:
    return next((m for pattern, m in _INSTEAD.items() if re.search(pattern, operation)), OTHERWISE)
