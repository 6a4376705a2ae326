"""The rows and columns of the certificate, and why a cell may have no test."""

from __future__ import annotations

from typing import NamedTuple

FAMILIES = {
    "Norms": ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "modulation"),
    "Activation": ("bias_act_dropout",),
    "Attention": ("scaled_dot_product_attention", "varlen_attention"),
    "Dropout": ("dropout_mask",),
}
OPERATORS = {op: family for family, ops in FAMILIES.items() for op in ops}
PROVIDERS = ("triton", "cuda", "cpu", "torch", "reference")
PROPERTIES = {  # what a passing test proves
    "forward": "outputs are within the error budget of the float64 formula",
    "backward": "so is every gradient",
    "double backward": "the gradient of a gradient is that of the float64 formula",
    "forward-mode": "so are tangents, by `torch.func.jvp` and by dual numbers",
    "vmap": "so are the operator and its gradient under `torch.vmap`",
    "compile": "`torch.compile` makes one graph, with the results of the eager call",
    "autocast": "the output has the dtype that torch's function has, and the formula's values",
    "strided": "strided rows give what contiguous ones give; `cuda` refuses strides within a row",
    "empty": "no samples give no outputs, and zero gradients of parameters",
    "2^31 elements": "inputs at offsets past 2^31 are read rightly; `dropout_mask` writes so far too",
    "deterministic": "two runs have the same bits, gradients too",
    "batch-invariant": "a sample has the same bits in any batch",
    "CUDA graph": "a captured call replays; with a stand-in: capture launches what the call launches",
    "NaN safety": "NaN and Inf of one sample, of what is masked or dropped, reach no other result",
}
KINDS = {  # on what a test ran: the symbol, and what it means; the strongest first
    "GPU": ("G", "the provider's code ran on a GPU"),
    "CPU": ("C", "the provider's code ran on a CPU, as it does for a user"),
    "interpreter": ("I", "the Triton kernels ran in Triton's interpreter on a CPU"),
    "emulation": ("E", "the CUDA C++ kernels ran in an emulation on a CPU"),
    "formulas": ("F", "no kernel runs there: torch's elementary operators compute it, and ran on a CPU"),
    "stand-in": ("S", "the real launcher ran on a fake driver: tests checked each parameter, and no kernel ran"),
    "compiled": ("P", "the compiled machine code was checked for register spills and needless access, and not run"),
}
NEVER_RUN = ("g", "needs a GPU: the linked test is there and was never run")
NOT_APPLICABLE = ("–", "does not apply, or is not offered: the letter names the reason below")


class Reason(NamedTuple):
    """Why the cells of these operators, providers and properties have no test."""

    ops: tuple[str, ...]
    providers: tuple[str, ...]
    properties: tuple[str, ...]
    text: str


EVERY = tuple(PROPERTIES)
MASK = ("dropout_mask",)
REASONS = (
    Reason(tuple(OPERATORS), ("cpu",), ("CUDA graph",), "It does not apply: the provider has no kernels for a GPU."),
    Reason(
        MASK,
        ("cpu", "reference"),
        ("backward", "double backward", "forward-mode"),
        "It does not apply: a mask of booleans has no derivative.",
    ),
    Reason(
        MASK,
        ("cpu", "reference"),
        ("autocast", "strided", "NaN safety"),
        "It does not apply: `dropout_mask` reads no tensor but its seed.",
    ),
    Reason(("varlen_attention",), ("torch",), ("CUDA graph",), "torch's attention takes no packed sequences"),
    Reason(MASK, ("torch",), EVERY, "torch has no mask that a seed and a position determine."),
    Reason(
        MASK,
        ("triton", "cuda"),
        tuple(name for name in EVERY if name != "forward"),
        "It does not apply: the kernels of the operators above make the mask, and `dropout_mask` runs none of them.",
    ),
)


def reasons_of(op: str, provider: str, name: str) -> list[str]:
    """Every reason that stands for a cell."""
    return [r.text for r in REASONS if op in r.ops and provider in r.providers and name in r.properties]
