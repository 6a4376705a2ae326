"""Where tensors lie, and how many elements they have: strides, nothing at all, offsets past 2^31."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operators import Operator, dtype_of
from torch import Tensor

# By dtype: the sums of a row may be made in another order where it lies otherwise.
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}
FAR = 2**31


def results(operator: Operator, leaves: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and the gradient of each leaf, for cotangents that differ from element to element."""
    given = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = operator.ours(given)
    cotangents = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, list(given.values()), cotangents)]


LAYOUTS = {  # of the leaves with samples: the same values at other strides
    "slice_of_a_projection": lambda leaf: torch.cat((leaf, leaf), -1)[..., : leaf.shape[-1]],
    "every_other_sample": lambda leaf: torch.stack((leaf, leaf), 1).flatten(0, 1)[::2],
    "samples_second": lambda leaf: leaf.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.certifies("strided")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_rows(operator: Operator, layout, leaves, using):
    """As of a contiguous copy, forward and backward."""
    strided = {name: LAYOUTS[layout](leaf) if name in operator.rows else leaf for name, leaf in leaves.items()}
    assert any(strided[name].stride() != leaves[name].stride() for name in operator.rows)
    with using:
        ours, expected = results(operator, strided), results(operator, leaves)
    torch.testing.assert_close(ours, expected, **CLOSE[dtype_of(leaves)])


@pytest.mark.certifies("empty")
def test_no_samples(operator: Operator, leaves, using):
    """Outputs have no elements either, and the gradients of what all samples share are zeros."""
    empty = {name: leaf[:0] if name in operator.rows else leaf for name, leaf in leaves.items()}
    with using:
        outputs, *gradients = results(operator, empty)
    assert outputs.shape == operator.exact({name: leaf.double() for name, leaf in empty.items()})[0].shape
    assert not outputs.numel()
    for name, gradient in zip(empty, gradients[-len(empty) :], strict=True):
        assert gradient.shape == empty[name].shape and not gradient.any()


def far(operator: Operator, leaf: Tensor, storage: Tensor) -> Tensor:
    """The leaf's values, past 2^31 elements from the first: the second sample, or the second head of attention."""
    strides = list(leaf.contiguous().stride())
    if operator.attention:
        heads = leaf.shape.index(2, 1)
        strides = [size // 2 if stride > strides[heads] else size for size, stride in zip(strides, strides)]
        strides[heads] = FAR
    else:
        strides[0] = FAR
    return storage.as_strided(leaf.shape, strides).copy_(leaf)


@pytest.mark.certifies("2^31 elements")
def test_a_part_past_2_to_the_31_elements(operator: Operator, leaves, using, device, generator):
    """Forward and backward give the bits of the same values side by side. What lies between is never touched."""
    near = operator.leaves(torch.float32, device, generator, samples=2)
    if device == "cpu":  # numpy's memory is not filled, and pages that nobody touches take none
        storage = torch.from_numpy(np.empty(FAR + 4096, dtype=np.float32))
    else:
        storage = torch.empty(FAR + 4096, dtype=torch.float32, device=device)
    with using:
        expected = results(operator, near)
        for name in operator.rows:
            spread = far(operator, near[name], storage)
            assert torch.equal(spread, near[name]) and FAR in spread.stride()
            if operator.name == "varlen_attention":
                assert FAR in spread.flatten(0, 1).stride()  # a view, not a copy
            found = results(operator, near | {name: spread})
            assert all(map(torch.equal, found, expected)), name
