"""float64 oracle, eager twin and error budget: what every numerical test of the package measures against.

Nothing here uses the package's own arithmetic: the formulas, Philox and the masks are written a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from eager_norm import NormKeepingItsOutput, torch_norm
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The oracle itself computes in float64, so against float64 results its own error counts: a chain of about
# eight float64 operations of half an ulp each. Against every other dtype it is negligible.
ORACLE_ROUNDINGS = 8
MODULATION = ("gate", "scale", "shift")  # a vector for each sample
DRAWS = 8
FEW_COLUMNS, TYPICAL_DRAWS, TYPICAL_FACTOR = 16, 64, 16

_LOW = 0xFFFFFFFF


def philox4x32(counter: tuple, key: tuple[int, int], rounds: int = 7) -> tuple:
    """Philox4x32 of Salmon et al. (SC 2011); counter words may be int64 tensors holding 32-bit values."""
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = key
    for _ in range(rounds):
        # int64 keeps the low 64 bits of a product; its sign, which >> would drag in, is masked away
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def keep_mask(rows: int, columns: int, p: float, seed: int, stream: int = 0, first_row: int = 0) -> Tensor:
    """True where an element is kept: key = seed, counter = (column // 4, row low, row high, stream)."""
    seed %= 2**64
    quads = torch.arange(max(-(-columns // 4), 0))[None, :]
    row = torch.arange(first_row, first_row + rows)[:, None]
    counter = torch.broadcast_tensors(quads, row & _LOW, row >> 32, torch.tensor(stream))
    words = torch.stack(philox4x32(counter, (seed % 2**32, seed >> 32)), dim=-1).reshape(rows, 4 * quads.numel())
    return words[:, :columns] >= int(p * 2**32)


def keep_scale(p: float) -> float:
    return torch.tensor(1.0 / (1.0 - p), dtype=torch.float32).item()


@dataclass(frozen=True)
class Call:
    """One call of a public norm: `ours` by the package, `eager` as torch users write it, `exact` float64.

    Each takes leaves by name: x, residual, weight, bias, x_bias, layer_scale, and gate, scale, shift of (samples,
    *normalized_shape). `view` turns the leaves x and residual into the tensors passed, `modulation` those of samples.
    Each returns (normed,) or (normed, residual_out).
    """

    function: str
    normalized_ndim: int = 1
    view: Callable[[Tensor], Tensor] = lambda leaf: leaf
    residual_view: Callable[[Tensor], Tensor] | None = None  # where it is not x's
    shared: bool = False  # the same tensor is passed as x and as residual
    options: Mapping[str, Any] = field(default_factory=dict)
    modulation: Callable[[Tensor], Tensor] = lambda leaf: leaf
    rebuilds: bool = True  # False: ``memory_efficient`` is expected to keep z after all, and held to that

    @property
    def rms(self) -> bool:
        return "rms" in self.function

    @property
    def fused(self) -> bool:
        return self.function.startswith("add_")

    def given(self, leaves: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is passed, of the leaves: the leaves, unless a subclass takes modulations out of others."""
        return leaves

    def _inputs(self, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        x = self.view(leaves["x"])
        if self.shared or "residual" not in leaves:
            return x, x if self.shared else None
        return x, (self.residual_view or self.view)(leaves["residual"])

    def ours(self, leaves: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        import fusednorm

        leaves = self.given(leaves)
        x, residual = self._inputs(leaves)
        normalized_shape = tuple(self._normalized_shape(x))
        affine = {n: leaves[n] for n in ("weight", "bias") if n in leaves}
        function = getattr(fusednorm, self.function)
        if not self.fused:
            return (function(x, normalized_shape, **affine, **self.options),)
        epilogue = {n: leaves[n] for n in ("x_bias", "layer_scale") if n in leaves}
        epilogue |= {n: self.modulation(leaves[n]) for n in MODULATION if n in leaves}
        outputs = function(x, residual, normalized_shape, **affine, **epilogue, **self.options)
        assert isinstance(outputs, tuple) and len(outputs) == 2
        return outputs

    def _normalized_shape(self, x: Tensor) -> torch.Size:
        return x.shape[x.ndim - self.normalized_ndim :]

    def columns(self, leaves: Mapping[str, Tensor]) -> float:
        """How many of a row dropout leaves, on average. Without a residual, the others are zero."""
        x, residual = self._inputs(leaves)
        left = 1.0 - self.options.get("dropout_p", 0.0) if residual is None else 1.0
        return left * self._normalized_shape(x).numel()

    def eps(self, dtype: torch.dtype) -> float:
        eps = self.options.get("eps", None if self.rms else 1e-5)
        if eps is None:  # torch.rms_norm takes the epsilon of the type it computes in, not of the one it stores
            eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        return eps

    def _stored(self, leaves: Mapping[str, Tensor]) -> torch.dtype:
        """The dtype of z."""
        return self.options.get("residual_dtype") or leaves.get("residual", leaves["x"]).dtype

    def computed_in(self, leaves: Mapping[str, Tensor]) -> torch.dtype:
        """float64 where x or z has it."""
        return torch.float64 if torch.float64 in (leaves["x"].dtype, self._stored(leaves)) else torch.float32

    def masks(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Element and drop-path factors (0 or the scale), in float64."""
        seed = int(self.options.get("seed", 0) or 0)
        p, path_p = self.options.get("dropout_p", 0.0), self.options.get("drop_path_p", 0.0)
        element = path = None
        if p:
            element = keep_mask(x.shape[:-1].numel(), x.shape[-1], p, seed).reshape(x.shape)
            element = (element.double() * keep_scale(p)).to(x.device)
        if path_p:
            samples = x.shape[0] if x.ndim > self.normalized_ndim else 1
            path = keep_mask(samples, 1, path_p, seed, stream=1).reshape(-1, *[1] * (x.ndim - 1))
            path = (path.double() * keep_scale(path_p)).to(x.device)
        return element, path

    def exact(self, leaves: Mapping[str, Tensor], dtype: torch.dtype, constant: bool = False) -> tuple[Tensor, ...]:
        """`leaves` in float64; `dtype` is what x was stored in. The statistics may be constants to the gradients."""
        leaves = self.given(leaves)
        x, residual = self._inputs(leaves)
        z = x
        if "x_bias" in leaves:
            z = z + leaves["x_bias"]
        element, path = self.masks(x)
        for factor in (element, leaves.get("layer_scale"), self._across_x("gate", leaves, x), path):
            z = z if factor is None else z * factor
        z = z if residual is None else residual + z
        dims = tuple(range(z.ndim - self.normalized_ndim, z.ndim))
        source = z.detach() if constant else z
        mean = 0.0 if self.rms else source.mean(dims, keepdim=True)
        centred = z - mean
        normed = centred / torch.sqrt((source - mean).square().mean(dims, keepdim=True) + self.eps(dtype))
        if "weight" in leaves:
            normed = normed * (leaves["weight"] + float(self.options.get("zero_centered_weight", False)))
        if "bias" in leaves:
            normed = normed + leaves["bias"]
        normed = self._modulated(normed, leaves)
        return (normed, z) if self.fused else (normed,)

    def _across_x(self, name: str, leaves: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
        """The leaf as it broadcasts to x."""
        if name not in leaves:
            return None
        shape = self._normalized_shape(x)
        return leaves[name].reshape(x.shape[0], *[1] * (x.ndim - len(shape) - 1), *shape)

    def _modulated(self, normed: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        scale, shift = (self._across_x(name, leaves, normed) for name in ("scale", "shift"))
        normed = normed if scale is None else normed * (1 + scale)
        return normed if shift is None else normed + shift

    def eager(self, leaves: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """At the tensors' dtypes, each operation rounding its result as torch does."""
        leaves = self.given(leaves)
        if self.computed_in(leaves) != torch.float64:  # not what float64 parameters would make torch do
            leaves = {n: leaf.float() if leaf.dtype == torch.float64 else leaf for n, leaf in leaves.items()}
        x, residual = self._inputs(leaves)
        z = x
        if "x_bias" in leaves:
            z = z + leaves["x_bias"]
        element, path = self.masks(x)
        if element is not None:
            z = (z * (element > 0)) * keep_scale(self.options["dropout_p"])
        if "layer_scale" in leaves:
            z = z * leaves["layer_scale"]
        if "gate" in leaves:
            z = z * self._across_x("gate", leaves, x)
        if path is not None:
            z = (z * (path > 0)) * keep_scale(self.options["drop_path_p"])
        stored = self._stored(leaves)
        if residual is not None:
            wide = torch.promote_types(torch.promote_types(z.dtype, residual.dtype), stored)
            z = residual.to(wide) + z.to(wide)
        z = z.to(stored)
        weight, bias = leaves.get("weight"), leaves.get("bias")
        # a bias of another dtype without a weight fails in torch's backward only
        if not self.fused and (weight is not None or bias is None or bias.dtype == z.dtype):
            try:  # what torch takes is the twin, its mixtures of dtypes too
                return (torch_norm(z, self._normalized_shape(z), weight, bias, self.eps(x.dtype), self.rms),)
            except RuntimeError:
                pass
        rebuilds = self.rebuilds and "scale" not in leaves and "shift" not in leaves
        normed = self._eager_norm(z, weight, bias, x.dtype, rebuilds)
        normed = self._modulated(normed, leaves).to(x.dtype)
        return (normed, z) if self.fused else (normed,)

    def _eager_norm(
        self, z: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, rebuilds: bool
    ) -> Tensor:
        shape = self._normalized_shape(z)
        wide = torch.promote_types(z.dtype, dtype)
        for parameter in (weight, bias):
            wide = wide if parameter is None else torch.promote_types(wide, parameter.dtype)
        if self.options.get("zero_centered_weight", False):
            # the tighter of two twins: 1 + weight is not rounded to a 16-bit dtype
            wide = torch.promote_types(wide, torch.float32)
            weight = None if weight is None else 1 + weight.to(wide)
        z, weight, bias = (None if t is None else t.to(wide) for t in (z, weight, bias))
        eps = self.eps(dtype)
        if self.options.get("memory_efficient", False) and rebuilds:
            return NormKeepingItsOutput.apply(z, weight, bias, eps, self.rms, shape, dtype)
        return torch_norm(z, shape, weight, bias, eps, self.rms).to(dtype)


def evaluate(
    run: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    leaves: Mapping[str, Tensor],
    cotangents: tuple[Tensor | None, ...],
) -> dict[str, Tensor | None]:
    """Outputs and every leaf's gradient, by name; an output whose cotangent is None is left out backwards."""
    leaves = {name: _copy(leaf).requires_grad_() for name, leaf in leaves.items()}
    outputs = run(leaves)
    results: dict[str, Tensor | None] = {
        name: output.detach().clone() for name, output in zip(("normed", "residual_out"), outputs, strict=False)
    }
    used = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    gradients = torch.autograd.grad(
        [output for output, _ in used], list(leaves.values()), [c for _, c in used], allow_unused=True
    )
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _copy(leaf: Tensor) -> Tensor:
    """With the original's distance from an aligned address."""
    offset = leaf.storage_offset()
    return leaf.new_empty(offset + leaf.numel())[offset:].view(leaf.shape).copy_(leaf)


def assert_within_budget(
    ours: Any,
    eager: Any,
    exact: Any,
    dtype: torch.dtype | None = None,
    what: str = "",
    computed_in: torch.dtype | None = None,
    factor: float = 2.0,
    terms: Any = None,
) -> None:
    """max|ours - exact| <= 2 max|eager - exact| + one rounding of the dtype at the exact result's magnitude.

    `terms` are the largest terms of the sum that a result is. Eager's error counts as one rounding of them at least,
    in the type that is `computed_in`: where they cancel, eager may be exact, which no other order of sums is.

    Takes tensors, or mappings from names to tensors (None: no gradient). `dtype` is what ours must have, or
    None for what eager has. A result may be stored wider than it is `computed_in` (the gradient of a float64
    weight beside float32 input); the rounding is then the coarser one.
    """
    if isinstance(exact, Mapping):
        assert ours.keys() == eager.keys() == exact.keys()
        faults = []
        for name in exact:
            try:
                assert_within_budget(
                    *(ours[name], eager[name], exact[name], dtype, f"{what}{name}", computed_in, factor),
                    terms=None if terms is None else terms[name],
                )
            except AssertionError as fault:
                faults.append(str(fault))
        assert not faults, "\n".join(faults)
        return
    if exact is None:
        assert ours is None or not ours.any(), f"{what}: a gradient where there is none"
        return
    assert ours is not None, f"{what}: no gradient"
    dtype = dtype or eager.dtype
    assert ours.dtype == dtype, f"{what}: dtype {ours.dtype}, expected {dtype}"
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    exact, ours_error, eager_error = (
        exact.detach(),
        ours.detach().double() - exact,
        eager.detach().double() - exact,
    )
    assert exact.isfinite().all(), f"{what}: the oracle itself is not finite; choose other inputs"
    bad = (~ours_error.isfinite()).sum().item()
    assert not bad, f"{what}: {bad} of {exact.numel()} elements are not finite"
    coarser = max(dtype, computed_in or dtype, key=lambda t: torch.finfo(t).eps)
    info = torch.finfo(coarser)
    magnitude = exact.abs().max().item()
    rounding = max(info.eps / 2 * magnitude, info.smallest_normal * info.eps)
    if coarser == torch.float64:
        rounding *= ORACLE_ROUNDINGS
    error, reference = ours_error.abs().max().item(), eager_error.abs().max().item()
    if terms is not None:
        reference = max(reference, torch.finfo(computed_in or dtype).eps / 2 * terms.abs().max().item())
    where = torch.unravel_index(ours_error.abs().argmax(), exact.shape or (1,))
    assert error <= factor * reference + rounding, (
        f"{what} ({dtype}): max|ours - fp64| = {error:.4g} at {tuple(map(int, where))} exceeds "
        f"{factor:g} * {reference:.4g} (eager) + {rounding:.4g} (one rounding at {magnitude:.4g})"
    )


def check(
    call: Call,
    leaves: Mapping[str, Tensor],
    generator: torch.Generator,
    used: tuple[bool, ...] = (True, True),
    redraw: Callable[[], Mapping[str, Tensor]] | None = None,
    lay: Callable[[Tensor], Tensor] = lambda cotangent: cotangent,
) -> None:
    """Forward and every gradient of one call against the oracle, random cotangents for the outputs `used`.

    `lay` says how a cotangent lies in memory: it makes the tensor passed from a contiguous one.

    The budget compares two largest errors, and on a small tensor one draw says little of either: eager may be
    lucky. Where a draw is over the budget, the same bound is put to the largest errors over DRAWS of them: of the
    same values in another order, or of what `redraw` gives, then as many as make 512 elements.

    A row of few columns, nearly constant or zero, magnifies every rounding, and the largest error is then that of one
    row however many are drawn: on float32 rows of 2 to 5 columns, where our root mean square error is 0.8 of eager's,
    the largest was over the budget in 0.2 to 5 of 100 sets, of 512 elements as of 16384. The bound is then put to
    TYPICAL_DRAWS draws one by one: at least half must be within it, and all within TYPICAL_FACTOR times eager's error.
    """

    def draw(leaves: Mapping[str, Tensor]) -> list[dict[str, Tensor | None]]:
        with torch.no_grad():
            outputs = call.eager(leaves)
        cotangents = tuple(
            lay(torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)) if use else None
            for o, use in zip(outputs, used, strict=False)
        )
        wide = {name: leaf.double() for name, leaf in leaves.items()}
        wide_cotangents = tuple(None if c is None else c.double() for c in cotangents)
        exact = evaluate(lambda t: call.exact(t, leaves["x"].dtype), wide, wide_cotangents)
        terms = exact  # but of a norm, whose gradient is a sum of three terms
        if isinstance(call, Call):
            terms = evaluate(lambda t: call.exact(t, leaves["x"].dtype, constant=True), wide, wide_cotangents)
        return [evaluate(call.ours, leaves, cotangents), evaluate(call.eager, leaves, cotangents), exact, terms]

    def budget(ours: Any, eager: Any, exact: Any, terms: Any, factor: float = 2.0) -> None:
        computed_in = call.computed_in(leaves)
        assert_within_budget(ours, eager, exact, None, f"{call.function} ", computed_in, factor, terms)

    first = draw(leaves)
    try:
        budget(*first)
    except AssertionError:
        draws = [first]
        while len(draws) < DRAWS or (redraw is not None and len(draws) * leaves["x"].numel() < 512):
            draws.append(draw(_shuffled(leaves, generator) if redraw is None else redraw()))
        try:
            budget(*(_stacked(results) for results in zip(*draws, strict=True)))
        except AssertionError as fault:
            if call.columns(leaves) > FEW_COLUMNS:
                raise
            more = [draw(_shuffled(leaves, generator) if redraw is None else redraw()) for _ in range(TYPICAL_DRAWS)]
            within = 0
            for results in more:
                with suppress(AssertionError):
                    budget(*results)
                    within += 1
            assert 2 * within >= TYPICAL_DRAWS, f"{fault}, and so do most of {TYPICAL_DRAWS} draws"
            budget(*(_stacked(results) for results in zip(*draws, *more, strict=True)), factor=TYPICAL_FACTOR)


def _shuffled(leaves: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh inputs of the same distribution: every leaf's values in another order."""
    return {
        name: leaf.flatten()[torch.randperm(leaf.numel(), generator=generator).to(leaf.device)].view_as(leaf)
        for name, leaf in leaves.items()
    }


def _stacked(results: tuple[dict[str, Tensor | None], ...]) -> dict[str, Tensor | None]:
    return {
        name: None if first is None else torch.stack([result[name] for result in results])
        for name, first in results[0].items()
    }
