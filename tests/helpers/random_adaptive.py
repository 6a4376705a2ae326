"""Blocks of random_blocks.py with gates, scales and shifts, in every form that a user might write them in."""

from __future__ import annotations

from random_blocks import Writer

# How the vectors are made, and how a statement names one of them.
VECTORS = (
    ("gate, scale, shift = self.{mod}(x.mean(1)).tanh().chunk(3, dim=-1)", "{}[:, None]"),
    ("gate, scale, shift = self.{mod}(x.mean(1)).tanh().chunk(3, dim=-1)", "{}.unsqueeze(1)"),
    ("gate, scale, shift = self.{mod}(x.mean(1)).tanh().chunk(3, dim=-1)", "{}[:, None, :]"),
    ("gate, scale, shift = self.{mod}(x.mean(1, keepdim=True)).tanh().chunk(3, dim=-1)", "{}"),
    ("gate, scale, shift = (self.table + self.{mod}(x.mean(1)).tanh().unflatten(-1, (3, D))).chunk(3, dim=1)", "{}"),
    ("gate, scale, shift = self.table.unbind(0)", "{}"),
)
ODD_VECTORS = (
    ("gate, scale, shift = self.{mod}(x).tanh().chunk(3, dim=-1)", "{}"),  # for each token
    ("gate, scale, shift = self.{mod}(x.mean(1)).tanh().to(LOW).chunk(3, dim=-1)", "{}[:, None]"),
    ("gate, scale, shift = self.{mod}(x.mean(1)).tanh().repeat(S, 1, 1).transpose(0, 1).chunk(3, dim=-1)", "{}"),
    (
        "gate, scale, shift = self.{mod}(x.mean(1)).tanh().mean(-1, keepdim=True).repeat(1, 3).chunk(3, dim=-1)",
        "{}[:, None]",
    ),
    ("gate, scale, shift = 0.5, 0.25, 0.125", "{}"),
    ("gate, scale, shift = self.{mod}(x.mean((0, 1))).tanh().chunk(3)", "{}"),
    ("gate = scale = shift = self.{mod}(x.mean(1)).tanh()[:, :D]", "{}[:, None]"),
    ("gate, scale, shift = self.{mod}(x.mean(1)).tanh().detach().chunk(3, dim=-1)", "{}[:, None]"),
)
MODULATIONS = (  # of the stream `x`, into `n`
    "n = {norm}(x) * (1 + {s}) + {t}",
    "n = {norm}(x)\nn = n * (1 + {s}) + {t}",
    "n = {norm}(x)\nn = {t} + (1 + {s}) * n",
    "n = {norm}(x)\nn = n * (1 + {s})\nn = n + {t}",
    "n = {norm}(x) * ({s} + 1.0)\nn = {t} + n",
    "h = {norm}(x)\nn = h * (1 + {s}) + {t}",
    "n = {norm}(x) * ({s} + 1)",
    "n = modulate({norm}(x), shift, scale)",
    "if self.flag:\n    n = x\nelse:\n    n = {norm}(x)\nif not self.flag:\n    n = n * (1 + {s}) + {t}",
    "if self.flag:\n    n = x\nelse:\n    n = {norm}(x)\nn = n * (1 + {s}) + {t}",
    "n = {norm}(x)\nif mask is None:\n    n = n * (1 + {s}) + {t}\nelif self.flag:\n    count = 1",
)
ODD_MODULATIONS = (
    "n = {norm}(x)\nm = n * (1 + {s}) + {t}\nkeep.append(n * 0.1)\nn = m",
    "n = {norm}(x)\nm = n * (1 + {s}) + {t}\nn = n * (1 + {t}) + {s}\nkeep.append(m * 0.1)",
    "n = {norm}(x) * {s} + {t}",
    "n = {norm}(x)\nn *= 1 + {s}\nn += {t}",
    "n = {norm}(x)\nn.mul_(1 + {s})\nn = n + {t}",
    "n = {norm}(x) * (2 + {s}) + {t}",
    "n = {norm}(x) * (1 - {s}) + {t}",
    "n = {norm}(x) * (1 + {s}) - {t}",
    "n = {norm}(x) * (1 + x * 0.1) + x",
    "n = {norm}(x)\nx = x * 1.0\nn = n * (1 + {s}) + {t}",
    "n = {norm}(x)\nn = helper(n * (1 + {s}) + {t}) + n",
    "n = {norm}(x)\nkeep.append((lambda: n * 0.1)())\nn = n * (1 + {s}) + {t}",
    "n = {norm}(x)\nscale = scale * 1.0\nscale *= 2\nn = n * (1 + {s}) + {t}",
    "scale = scale * 1.0\nx = x + 0.1 * x\nscale.mul_(2)\nn = {norm}(x) * (1 + {s}) + {t}",
    "n = {norm}(x)\ntry:\n    n = n * (1 + {s}) + {t}\nfinally:\n    keep.append(n * 0.1)",
    "for _ in range(2):\n    n = {norm}(x)\n    n = n * (1 + {s}) + {t}",
    "n = {norm}(x)\nif self.flag:\n    n = n * (1 + {s}) + {t}",
    "n = {norm}(x)\nif n.sum() > -1e9:\n    n = n * (1 + {s}) + {t}",
    "n = {norm}(x)\nif mask is None:\n    n = n * (1 + {s}) + {t}\nelse:\n    n = n * 0.5",
    "n = {norm}(x)\nn, other = n * (1 + {s}) + {t}, n",
    "n = {norm}(x) * (1 + {s}) + {t}\nkeep.append({norm}(x) * 0.1)",
    "n = {norm}(x) * (1 + (s := {s})) + {t}\nkeep.append(s * x * 0.1)",
    "n = other({norm}(x), shift, scale)",
)
GATES = (
    *("x = {r} + {g} * {b}", "x = {r} + {b} * {g}", "x = {g} * {b} + {r}", "x = {b} * {g} + {r}"),
    *("y = {b}\ny = {g} * y\nx = {r} + y", "y = {b}\ny = {g} * y\nx = y + {r}", "x = {r} + self.path({g} * {b})"),
    "y = {b}\nif not self.flag:\n    y = {g} * y\nx = y + {r}",
    "y = {b}\nif self.flag:\n    y = {g} * y\nelif mask is None:\n    y = y * {g}\nx = {r} + y",
)
ODD_GATES = (
    *("x = {r} + 0.5 * {b}", "y = {b}\ny = y * {g}\ny *= {g}\nx = {r} + y", "x = {r} + ({g} * {b} + 0.1)"),
    *("y = {g} * {b}\nkeep.append(y * 0.1)\nx = {r} + y", "x = {r} + {g} * {g} * {b}", "x = {r} + {g} * {b} * {r}"),
    *("y = {b}\nif not self.flag:\n    y = {g} * y\nx = {r} + y\nkeep.append(y * 0.1)", "x = {r} + (1 + {g}) * {b}"),
    *(
        "y = {b}\nif mask is None:\n    y = {g} * y\nx = {r} + y * 0.5",
        "x = {r} + F.dropout({g} * {b}, self.p, self.training)",
    ),
    *("y = {b}\ny = {g} * y\ny = F.dropout(y, self.p, self.training)\nx = {r} + y", "x = {r} + {b} / (2 + {g})"),
    *("x = {r} - {g} * {b}", "y = {g} * {b}\ny.add_(0.1)\nx = {r} + y", "y = {b}\ngate = gate * 2\nx = {r} + {g} * y"),
    *("y = {b}\nz = {g} * y\nx = {r} + z\nx = x + 0.1 * y", "y = {r}\nif not self.flag:\n    y = {g} * y\nx = y + y"),
)


FUNCTIONS = """def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

def other(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + 2 * shift.unsqueeze(1)

"""


class Adaptive(Writer):
    """Every step has a modulated norm, a gate, or both."""

    functions = FUNCTIONS

    def step(self) -> list[str]:
        self.init += (
            [] if any("table" in line for line in self.init) else ["self.table = nn.Parameter(torch.zeros(3, D))"]
        )
        mod = self.part("mod", "nn.Linear(D, 3 * D)").removeprefix("self.")
        made, view = self.rng.choice(ODD_VECTORS if self.odd() else VECTORS)
        self.drawn.append(f"vectors: {made}, as {view}")
        lines = [made.replace("{mod}", mod)]
        residual, norm = "x", self.norm()
        if self.rng.random() < 0.4:
            residual = "residual"
            lines.append("residual = x")
        names = {"s": view.format("scale"), "t": view.format("shift"), "norm": norm}
        modulation = self.pick(ODD_MODULATIONS if self.odd(1.5) else MODULATIONS, "modulation")
        if "(0, 1)" in made or (view == "{}" and "modulate(" in modulation):
            modulation = MODULATIONS[0]
        before = self.rng.random() < 0.4
        normed = modulation.format(**names).split("\n")
        statements, branch = self.branch("n" if before else "x")
        gate = self.pick(ODD_GATES if self.odd(1.5) else GATES, "gate")
        if "self.path" in gate:
            self.init.append("self.path = nn.Dropout(0.3)")
        summed = gate.format(r=residual, b=branch, g=view.format("gate")).split("\n")
        if before:
            return [*lines, *normed, *statements, *summed]
        return [*lines, *statements, *summed, *normed, "x = x + 0.5 * n"]
