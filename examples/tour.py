# %% [markdown]
# A tour of fusednorm, for someone who knows PyTorch. Run it whole (`python examples/tour.py`), or cell by cell in an
# editor that knows `# %%`. Every figure that is printed was computed just before.

# %% Start
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednorm

torch.manual_seed(0)


def title(text: str) -> None:
    print(f"\n--- {text}")


def largest(a: Tensor, b: Tensor) -> str:
    """The largest difference between two tensors, as text."""
    return f"{(a.double() - b.double()).abs().max().item():.1e}"


def kept_bytes(run, parameters=()) -> int:
    """Bytes that autograd keeps from a forward for its backward, parameters left out. A storage counts once."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = run()
    del result
    return sum(found.values())


print(f"fusednorm {fusednorm.__version__} with torch {torch.__version__}.")
print(f"Providers, the implementations that can run here: {', '.join(fusednorm.available_providers())}.")

# %% Swap a norm
title("Swap a norm: same constructor, same weights, same numbers")
theirs, ours = nn.LayerNorm(256), fusednorm.LayerNorm(256)
nn.init.normal_(theirs.weight)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(64, 256)
exact = nn.LayerNorm(256).double()
exact.load_state_dict(theirs.state_dict())
truth = exact(x.double())
print(f"Their largest difference is {largest(ours(x), theirs(x))}.")
print(f"From float64, torch's norm differs by {largest(theirs(x), truth)}, and ours by {largest(ours(x), truth)}.")
print(f"isinstance(ours, nn.LayerNorm) is {isinstance(ours, nn.LayerNorm)}.")

# %% Fuse the residual path
title("The residual path of a pre-norm block: dropout, sum and norm in one call")
width, p, seed = 256, 0.1, 7
branch, residual = (torch.randn(32, 64, width, requires_grad=True) for _ in range(2))
weight = torch.ones(width, requires_grad=True)
mask = fusednorm.dropout_mask(branch.shape, p, seed)  # what the seed stands for


def fused() -> tuple[Tensor, Tensor]:
    return fusednorm.add_rms_norm(branch, residual, width, weight, dropout_p=p, seed=seed)


def unfused() -> tuple[Tensor, Tensor]:
    total = residual + torch.where(mask, branch / (1 - p), 0.0)
    return F.rms_norm(total, (width,), weight, eps=1e-6), total


for name, a, b in zip(("normed tensor", "residual stream"), fused(), unfused(), strict=True):
    print(f"The {name}: the largest difference from torch's operators is {largest(a, b)}.")
inputs = (branch, residual, weight)
gradients = [torch.autograd.grad(run()[0].sin().sum(), inputs) for run in (fused, unfused)]
print(f"The branch's gradient: the largest difference is {largest(gradients[0][0], gradients[1][0])}.")

# %% What is kept for the backward
title("What a forward keeps for its backward")


def eager() -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(branch, p)
    return F.rms_norm(total, (width,), weight), total


a, b = (kept_bytes(run, [weight]) for run in (eager, fused))
print(f"The residual step keeps {a / 2**20:.1f} MiB by torch's operators, and {b / 2**20:.1f} MiB fused.")
sizes = {"d_model": 256, "nhead": 4, "dim_feedforward": 1024, "batch_first": True}
batch = torch.randn(8, 64, 256)
encoders = nn.TransformerEncoderLayer(**sizes), fusednorm.TransformerEncoderLayer(**sizes)
a, b = (kept_bytes(lambda layer=layer: layer(batch), layer.parameters()) for layer in encoders)
print(f"An encoder layer keeps {a / 2**20:.1f} MiB in torch.nn, and {b / 2**20:.1f} MiB here: {b / a:.0%}.")
print("The backward makes dropout's masks again from the seed, so no mask is stored.")

# %% Attention with padding
title("Attention over a padded batch")
lengths = torch.tensor([48, 20, 7])
q, k, v = (torch.randn(3, 4, 48, 32, requires_grad=True) for _ in range(3))  # batch, heads, length, head_dim
real = torch.arange(48) < lengths[:, None]
out = fusednorm.scaled_dot_product_attention(q, k, v, is_causal=True, key_mask=real)
full = real[:, None, None] & torch.ones(48, 48, dtype=torch.bool).tril()  # what torch wants instead
expected = F.scaled_dot_product_attention(q, k, v, full)
rows = real[:, None].expand(out.shape[:3])
print(f"Sentences of {lengths.tolist()} tokens are padded to 48. Causal and padding mask go into one call.")
print(f"The largest difference from torch with a full mask is {largest(out[rows], expected[rows])}.")
print(f"Our masks take {real.numel()} bytes, torch's {full.numel()}.")
(gradient,) = torch.autograd.grad(out[rows].sum(), k)
print(f"The gradient of hidden keys is at most {gradient.transpose(1, 2)[~real].abs().max().item()}.")

# %% Accelerate a model
title("A model of your own in one line")


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h, _ = self.attention(h, h, h, need_weights=False)
        x = x + self.drop(h)
        return x + self.drop(self.down(self.act(self.up(self.norm2(x)))))


model = nn.Sequential(Block(), Block(), nn.LayerNorm(64)).eval()
tokens = torch.randn(4, 16, 64)
before, names = model(tokens), list(model.state_dict())
report = fusednorm.accelerate(model)
print(report)
print(f"The largest difference before and after is {largest(model(tokens), before)}.")
print(f"The state_dict has the same {len(names)} names: {list(model.state_dict()) == names}.")
fusednorm.restore(model)
print(f"After restore() the first block is of its own class again: {type(model[0]) is Block}.")

# %% Dropout
title("A dropout mask is a function of the seed")
first = fusednorm.dropout_mask((1000, 1000), 0.1, seed=42)
print(f"Seed 42 at p = 0.1 drops {1 - first.double().mean().item():.2%} of a million elements.")
again = fusednorm.dropout_mask((1000, 1000), 0.1, seed=42)
other = fusednorm.dropout_mask((1000, 1000), 0.1, seed=43)
print(
    f"Drawn again it is the same: {torch.equal(first, again)}. Seed 43 gives another: {not torch.equal(first, other)}."
)
_, stream = fusednorm.add_layer_norm(torch.ones(8, 64), None, 64, dropout_p=0.25, seed=7)
same = torch.equal(stream != 0, fusednorm.dropout_mask((8, 64), 0.25, seed=7))
print(f"add_layer_norm drops exactly what dropout_mask of its seed says: {same}.")

# %% Generate
title("Generate with a cache of keys and values")
vocabulary, length = 100, 96
table, places = nn.Embedding(vocabulary, 64), nn.Embedding(length + 1, 64)
layer = fusednorm.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True)
decoder = fusednorm.TransformerEncoder(layer, 3).eval()


def step(tokens: Tensor, cache: fusednorm.KVCache) -> Tensor:
    """Logits of new tokens; the cache holds those before them."""
    return decoder(table(tokens) + places(cache.positions(tokens)), cache=cache) @ table.weight.T


def whole(tokens: Tensor) -> Tensor:
    """The same logits from all tokens at once."""
    count = tokens.shape[1]
    future = torch.ones(count, count, dtype=torch.bool).triu(1)
    return decoder(table(tokens) + places.weight[:count], mask=future, is_causal=True) @ table.weight.T


prompt = torch.randint(vocabulary, (2, 1))
with torch.no_grad():
    start = time.perf_counter()
    generated = fusednorm.generate(step, prompt, length).tokens
    middle = time.perf_counter()
    sequence = prompt
    for _ in range(length):
        sequence = torch.cat((sequence, whole(sequence)[:, -1:].argmax(-1)), 1)
    end = time.perf_counter()
print(f"{length} tokens of 2 sequences took {middle - start:.2f} s with the cache.")
print(f"They took {end - middle:.2f} s with the whole sequence computed again for each token.")
print(f"The tokens are the same: {torch.equal(generated, sequence[:, 1:])}.")

# %% Explain
title("Which code ran, and why")
print(fusednorm.explain(fusednorm.add_layer_norm, torch.randn(64, 256), torch.randn(64, 256), 256))
with fusednorm.use_provider("torch"):
    print(fusednorm.explain(fusednorm.add_layer_norm, torch.randn(64, 256), torch.randn(64, 256), 256))
print("The last line is inside use_provider('torch'), which goes back to torch's own operators.")
print(
    "\nNext: `fusednorm bench` times these operators on your machine. `fusednorm tune` lets them choose by such times."
)
