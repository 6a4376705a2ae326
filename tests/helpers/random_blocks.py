"""Modules drawn at random, as source text: residual steps in every form that a user might write them in.

`draw(seed)` gives a `Block`: the text, what was drawn into it, and what is done to the model after it was made. The
text is written into a file and imported, so that `inspect.getsource` finds it. `make()` gives the model. The globals
`SCALE` and `helper` may be assigned anew.
"""

from __future__ import annotations

import dataclasses
import random

B, S, D, H = 2, 3, 8, 12

HEADER = f"""import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

B, S, D, H = {B}, {S}, {D}, {H}
LOW = torch.bfloat16
SCALE = 0.5

def helper(t):
    return t * SCALE

def plain_decorator(forward):
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs) * 1.5
    return wrapper

def wrapping_decorator(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs) * 1.5
    return wrapper

class LlamaNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

class T5Norm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states

class ZeroCentredNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)

class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 0.5

class Mixer(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D, bias=bias)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


"""

NORMS = (
    *("nn.LayerNorm(D)", "nn.LayerNorm(D)", "nn.LayerNorm(D, eps=1e-3)", "nn.LayerNorm(D, bias=False)"),
    *("nn.LayerNorm(D, elementwise_affine=False)", "nn.RMSNorm(D)", "nn.RMSNorm(D, eps=1e-5)"),
    *("LlamaNorm(D)", "T5Norm(D)", "ZeroCentredNorm(D)"),
)
ACTIVATIONS = (
    *("nn.GELU()", "nn.GELU(approximate='tanh')", "nn.ReLU()", "nn.SiLU()", "nn.Tanh()", "nn.ReLU(inplace=True)"),
    *("F.gelu({})", "F.gelu({}, approximate='tanh')", "F.silu({})", "torch.relu({})", "F.relu({})", "torch.tanh({})"),
)
LINEARS = (
    *("nn.Linear({}, {})",) * 5,
    "nn.Linear({}, {}, bias=False)",
    "weight_norm(nn.Linear({}, {}))",
    "LowRank(nn.Linear({}, {}))",
    "nn.Linear({}, {}).requires_grad_(False)",
)
SUMS = (
    *("x = {r} + {b}", "x = {r} + {b}", "x = {b} + {r}", "x = {r}.add({b})", "x = torch.add({r}, {b})"),
    *("x: Tensor = {r} + {b}", "x = {r} + 0.5 * {b}", "x = {r} + {b} + 0.1", "x = {r} + {b} + {r}"),
    *("x = torch.add({r}, {b}, alpha=0.5)", "x, other = {r} + {b}, {r} * 2", "x = (s := {r} + {b})"),
    *("x = torch.add(input={b}, other={r})", "y = {b}\n{r} = {r} * 1.0\ny += {r}\nx = y", "x = {r} - {b}"),
    *("y = {b}\ny += {r}\nx = y", "x = {r}\nx = x + {b}", "x = {r} + {b} * self.gamma", "x = {r} + helper({b})"),
    *("y = {b}\nx = torch.add({r}, y)\ndel y", "x = {r} * 1.0\nx += {b}", "x = {r} * 1.0\nx.add_({b})"),
)
AFTER_SUM = (  # between the sum and the norm that may read it
    *("x.mul_(2)", "x += 1", "torch.relu_(x)", "x = x * 1.0", "alias = x\nalias.mul_(1.5)", "x[:, 0] = 0.5"),
    *("keep.append(x)", "keep.append((lambda: x * 0.1)())", "keep.append(sum([x * i for i in range(2)]))"),
    *("f = lambda: x * 0.1", "x = x + 0.01 * len(locals())", "x = x + locals()['x'].mean()"),
    *("if self.flag:\n    return x", "name = f'{x.dim()} {x.dtype}'\nassert name[0] == '3'", "x = torch.sigmoid(x)"),
    *("def inner():\n    return x * 0.1\n\nkeep.append(inner())", "x = x.view(x.shape)", "x, other = x, x * 0.1"),
    *("x = helper(x)", "x.data.add_(0.5)", "with torch.no_grad():\n    x.clamp_(max=1.0)", "x = x.clone()"),
    *("x.retain_grad() if x.requires_grad else None", "assert x.grad_fn is not None or not torch.is_grad_enabled()"),
    *("x.register_hook(lambda g: g * 2) if x.requires_grad else None", "x = x.detach() + 0 * x"),
)
AFTER_NORM = (  # the normed is in `n`, the sum in `x`
    *("keep.append(x)", "x = x + 0.1 * n", "x.mul_(2)", "n.mul_(2)", "x += 1", "n = n + 1", "n = helper(n)"),
    *("keep.append(f())\nn = n * 1.0", "n = n.view(n.shape)", "del x\nx = n", "keep.append({norm}(x) * 0.1)"),
    *("keep.append({norm}(x * 2))", "x = x.detach()", "keep.append(locals()['n'] * 0.1)"),
)
WRAPPERS = (
    *("if self.training:", "if mask is not None:", "if self.flag:", "if x.sum() > -1e9:", "if not self.flag:"),
    *("for _ in range(2):", "while count < 2:\n    count += 1", "try:", "with torch.enable_grad():"),
    *("with torch.no_grad():", "with contextlib.nullcontext():", "for i, scale in enumerate((1, 2)):"),
    "if mask is None or self.flag:",
)
LOOPS = (  # how a model calls its blocks
    *("x = block(x, mask=mask)",) * 4,
    *(
        "x = block(x, mask=mask)\nx.mul_(1.5)",
        "x = block(x, mask=mask)\nx.data.mul_(1.5)",
        "x = helper(block(x, mask=mask))",
    ),
    *("seen.append(x)\nx = block(x, mask=mask)", "x = block(x, mask=mask)\nseen.append(x)", "x = block(x) + 0.5 * x"),
    *("x = block(x, mask=mask)\ny = x\ny.mul_(1.5)", "x = checkpoint(block, x, mask, use_reentrant=False)"),
    *("x = block(x, mask=mask)\nif i == 0:\n    x = x * 2", "x = block(x, mask=mask).detach()", "x, y = block(x), x"),
    *("x = block(x, mask=mask)\nx.data = x.data * 1.5", "with torch.no_grad():\n    block(x)\nx = block(x, mask=mask)"),
)
IN_PLACE = ("mul_(", "add_(", "relu_(", "clamp_(", "+= 1", ".data", "] =")
KINDS = ("plain", "plain", "plain", "inherited", "super", "wraps", "decorated", "closure", "star", "method")


@dataclasses.dataclass
class Block:
    seed: int
    text: str  # of the blocks, without the header
    drawn: list[str]
    after: list[str]  # what is done once it was accelerated: flag, scale, helper, norm, linear, forward

    def source(self, exact: bool) -> str:
        """What each dtype stands for where it is exact: float64."""
        text = HEADER + self.text
        for name, wide in (("torch.float32", "torch.float64"), ("LOW = torch.bfloat16", "LOW = torch.float64")):
            text = text.replace(name, wide) if exact else text
        return text.replace(".float()", ".double()") if exact else text


class Writer:
    functions = ""  # before the class

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.init: list[str] = []
        self.body: list[str] = []
        self.drawn: list[str] = []
        self.norms: list[str] = []
        self.dirt = (0.0, 0.15, 0.3, 0.4)[seed % 4]  # how likely each unusual thing is
        self.turn: int | None = seed if self.dirt else None  # so that each change is drawn at some seed

    def odd(self, share: float = 1.0) -> bool:
        return self.rng.random() < self.dirt * share

    def pick(self, options: tuple[str, ...], label: str = "") -> str:
        chosen = self.rng.choice(options)
        if label:
            self.drawn.append(f"{label}: {chosen.splitlines()[0]}")
        return chosen

    def part(self, kind: str, expression: str) -> str:
        name = f"{kind}{len(self.init)}"
        self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def norm(self) -> str:
        if self.norms and self.odd():
            self.drawn.append("shared norm")
            return self.rng.choice(self.norms)
        self.norms.append(self.part("norm", self.pick(NORMS, "norm")))
        return self.norms[-1]

    def linear(self, inner: int, outer: int) -> str:
        text = self.pick(LINEARS, "linear") if self.odd(2) else "nn.Linear({}, {})"
        return self.part("fc", text.format(inner, outer))

    def dropped(self, expression: str) -> str:
        form = self.pick(("none", "module", "module", "function"), "dropout")
        if form == "none":
            return expression
        if form == "module":
            return f"{self.part('drop', 'nn.Dropout(0.3)')}({expression})"
        return f"F.dropout({expression}, {'p=' if self.odd() else ''}self.p, training=self.training)"

    def activated(self, expression: str) -> str:
        act = self.pick(ACTIVATIONS, "activation")
        return act.format(expression) if "{}" in act else f"{self.part('act', act)}({expression})"

    def branch(self, source: str) -> tuple[list[str], str]:
        """Statements, and the expression that is added to the stream."""
        form = self.rng.choice(("nested", "nested", "lines", "lines", "linear", "mixer", "low", "token"))
        if form in ("low", "token") and not self.odd(2):
            form = "nested"
        self.drawn.append(f"branch: {form}")
        if form == "linear":
            return [], self.dropped(f"{self.linear(D, D)}({source})")
        if form == "mixer":
            return [], self.dropped(f"{self.part('mixer', f'Mixer(bias={self.rng.random() < 0.7})')}({source})")
        if form == "low":
            return [], f"{self.part('low', 'nn.Linear(D, D).to(LOW)')}({source}.to(LOW))"
        if form == "token":
            return [], f"{self.linear(D, D)}({source}[:, :1])"  # (B, 1, D): broadcasts
        first, second = self.linear(D, H), self.linear(H, D)
        if form == "nested":
            inner = self.activated(f"{first}({source})")
            inner = self.dropped(inner) if self.rng.random() < 0.3 else inner
            return [], self.dropped(f"{second}({inner})")
        lines = [f"y = {source}", f"y = {first}(y)"]
        if self.odd():
            self.drawn.append("linear output read again")
            lines += ["before = y", f"y = {self.activated('before')}", "keep.append(before[..., :D] * 0.1)"]
        else:
            lines.append(f"y = {self.activated('y')}")
        if self.rng.random() < 0.4:
            lines.append(f"y = {self.dropped('y')}")
        lines.append(f"y = {second}(y)")
        if self.odd():
            self.drawn.append("branch read again")
            lines.append("keep.append(y * 0.1)")
        lines.append(f"y = {self.dropped('y')}")
        return lines, "y"

    def sum(self, residual: str, branch: str) -> list[str]:
        form = self.pick(SUMS, "sum") if self.odd(2) else self.rng.choice(SUMS[:5])
        if self.odd(0.3):
            self.drawn.append("broadcast residual")
            self.init.append("self.position = nn.Parameter(torch.zeros(1, S, D))")
            form, residual = f"shift = self.position\n{form}", "shift"
        return form.format(r=residual, b=branch).split("\n")

    def step(self) -> list[str]:
        """One residual step of the stream `x`, before or after which it is normed."""
        before = self.rng.random() < 0.6
        self.drawn.append("pre-norm" if before else "post-norm")
        lines, residual, norm = [], "x", self.norm()
        if self.rng.random() < 0.4:
            residual = self.rng.choice(("residual", "shortcut"))
            lines.append(f"{residual} = x")
        if not before:
            made, branch = self.branch("x")
            if not self.dirt and self.rng.random() < 0.3:
                return [*lines, *made, f"x = {norm}({residual} + {branch})"]
            lines += [*made, *self.sum(residual, branch)]
            lines += self.changed(AFTER_SUM, norm)
            return [*lines, f"n = {norm}(x)", *self.changed(AFTER_NORM, norm), "x = n"]
        if self.rng.random() < 0.5 and residual == "x":
            made, branch = self.branch(f"{norm}(x)")
            lines += made
        else:
            lines += [f"n = {norm}(x)", *self.changed(AFTER_NORM, norm)]
            made, branch = self.branch("n")
            lines += made
        lines += self.sum(residual, branch)
        if residual != "x" and self.odd():
            self.drawn.append("residual read again")
            lines.append(f"keep.append({residual} * 0.1)")
        return lines + self.changed(AFTER_SUM, norm)

    def changed(self, options: tuple[str, ...], norm: str) -> list[str]:
        if self.turn is None and not self.odd():
            return []
        chosen = self.pick(options if self.turn is None else (options[self.turn % len(options)],), "then")
        self.turn = None
        return chosen.replace("{norm}", norm).split("\n")

    def wrapped(self, lines: list[str]) -> list[str]:
        if not self.odd():
            return lines
        opening = self.pick(WRAPPERS, "inside").split("\n")
        ending = ["finally:", "    self.calls = 1"] if opening == ["try:"] else []
        start = ["count = 0"] if opening[0].startswith("while") else []
        if opening[0].startswith("if") and self.odd():
            ending = ["else:", "    x = x * 0.5"]
        return [*start, *opening, *(f"    {line}" if line else line for line in lines), *ending]


def draw(seed: int, kind_of_writer: type[Writer] | None = None) -> Block:
    writer = (kind_of_writer or Writer)(seed)
    rng = writer.rng
    kind = writer.pick(KINDS, "kind")
    lines = ['"""A block."""'] if rng.random() < 0.2 else []
    at = len(lines)
    if writer.odd():
        writer.drawn.append("global statement")
        lines.insert(0, "global SCALE")
        at += 1
    if writer.odd():
        writer.drawn.append("masked")
        lines.append("x = x if mask is None else x.masked_fill(mask[..., None], 0.0)")
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        lines += writer.wrapped(writer.step())
    if rng.random() < 0.3:
        lines.append(f"x = {writer.norm()}(x)")
    lines.append("return x + sum(keep)" if any("keep" in line for line in lines) else "return x")
    needed = {"keep": "keep = []", "f()": "f = lambda: 0.0"}
    lines[at:at] = [text for name, text in needed.items() if any(name in line for line in lines)]
    after = [what for what in ("flag", "scale", "helper", "norm", "linear", "forward") if writer.odd(0.3)]
    text = writer.functions + _class(writer, kind, lines)
    return Block(seed, text + _model(writer, text), writer.drawn, after)


def _class(writer: Writer, kind: str, lines: list[str]) -> str:
    init = ["super().__init__()", "self.flag, self.p = False, 0.3", "self.gamma = nn.Parameter(torch.ones(D))"]
    init += writer.init
    signature, name = "self, x, mask=None", "Base" if kind in ("inherited", "super") else "Block"
    if kind == "star":
        signature = "self, *args, **kwargs"
        at = sum(line.startswith(('"""', "global")) for line in lines[:2])
        lines = [*lines[:at], "x, mask = args[0], kwargs.get('mask')", *lines[at:]]
    decorator = {"wraps": "    @wrapping_decorator\n", "decorated": "    @plain_decorator\n"}.get(kind, "")
    if kind == "closure":
        lines = [*lines[:-1], "x = x * factor", lines[-1]]
    if kind == "method":
        method = _function("forward", signature, ["return self.steps(x, mask)"])
        method += "\n" + _function("steps", signature, lines)
    else:
        method = decorator + _function("forward", signature, lines)
    text = f"class {name}(nn.Module):\n" + _function("__init__", "self", init) + "\n" + method
    if kind == "closure":
        text = "def factory(factor):\n" + "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())
        text += "    return Block\n\n\nBlock = factory(0.75)\n"
    if kind == "inherited":
        text += "\n\nclass Block(Base):\n    pass\n"
    if kind == "super":
        made = _function("__init__", "self", ["super().__init__()", "self.last = nn.Linear(D, D)"])
        lines = ["x = super().forward(x, mask=mask)", "return x + self.last(x)"]
        text += f"\n\nclass Block(Base):\n{made}\n{_function('forward', signature, lines)}"
    return text


def _function(name: str, signature: str, lines: list[str]) -> str:
    return f"    def {name}({signature}):\n" + "".join(f"        {line}\n" if line else "\n" for line in lines)


def _model(writer: Writer, text: str) -> str:
    """The blocks in a list, so that one block's sum is normed by the next; the input's stem, and what comes last."""
    rng = writer.rng
    init, body = ["super().__init__()"], []
    blocks = "[Block()] * 2" if writer.odd() else f"[Block() for _ in range({rng.choice((1, 1, 2))})]"
    init.append(f"self.blocks = nn.ModuleList({blocks})")
    if rng.random() < 0.5:
        writer.drawn.append("integer input")
        init.append("self.stem = nn.Embedding(11, D)")
        body.append("x = self.stem(ids)")
    else:
        body.append("x = x.clone()")
    final = rng.random() < 0.5
    init += [f"self.final = {writer.pick(NORMS, 'final')}"] * final
    loop = writer.pick(LOOPS, "loop").split("\n") if writer.odd(2) else [LOOPS[0]]
    if "checkpoint" in loop[0] and any(mark in text for mark in IN_PLACE):
        loop = [LOOPS[0]]  # a checkpoint hides from torch that a saved tensor was changed: wrong gradients, no error
    over = writer.pick(("self.blocks", "reversed(self.blocks)", "self.blocks[:2]")) if writer.odd() else "self.blocks"
    body += ["seen = []", f"for i, block in enumerate({over}):"] if writer.dirt else ["for block in self.blocks:"]
    body += [f"    {line}" for line in loop]
    body += ["x = self.final(x)"] * final
    body.append("return x, x * 2" if rng.random() < 0.3 else "return x" if not writer.dirt else "return x, *seen")
    made = _function("__init__", "self", init) + "\n" + _function("forward", "self, x, ids, mask=None", body)
    return f"\n\nclass Model(nn.Module):\n{made}\n\ndef make():\n    return Model()\n"
