"""A pre-norm feed-forward block in two fused steps: dropout, residual and norm; then bias, GELU and dropout."""

import torch
import torch.nn.functional as F
from torch import nn

import fusednorm


class FeedForward(nn.Module):
    """Takes the last block's branch and the residual stream; returns its own branch and the stream."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = fusednorm.AddLayerNorm(width, dropout_p=dropout)  # drops the branch before it is added
        self.up, self.down, self.dropout = nn.Linear(width, hidden), nn.Linear(hidden, width), dropout

    def forward(self, branch: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, stream = self.norm(branch, stream)  # stream + dropout(branch), and its norm
        hidden = F.linear(normed, self.up.weight)  # bias_act_dropout adds the bias
        dropped = self.dropout if self.training else 0.0  # functions drop in eval mode too
        return self.down(fusednorm.bias_act_dropout(hidden, self.up.bias, "gelu", dropped)), stream


def main() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(FeedForward(64, 256, dropout=0.1) for _ in range(3))
    last = fusednorm.AddLayerNorm(64, dropout_p=0.1)
    stream = torch.randn(8, 16, 64)
    branch = torch.zeros_like(stream)  # nothing comes before the first block
    for block in blocks:
        branch, stream = block(branch, stream)
    normed, stream = last(branch, stream)  # the last branch joins the stream here
    F.mse_loss(normed, torch.randn_like(normed)).backward()
    print(f"{len(blocks)} blocks ran; the first one's gradient has norm {blocks[0].up.weight.grad.norm():.3f}")
    print(fusednorm.explain(blocks[0], branch, stream))  # what serves the two steps of a block


if __name__ == "__main__":
    main()
