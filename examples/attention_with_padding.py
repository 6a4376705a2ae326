"""Causal attention over a padded batch, with dropout: one call takes all masks."""

import torch

import fusednorm


def main() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([16, 9, 4])
    query, key, value = (torch.randn(3, 8, 16, 64, requires_grad=True) for _ in range(3))  # batch, heads, length, width
    real = torch.arange(16) < lengths[:, None]  # (batch, keys); True attends, other than in key_padding_mask
    out = fusednorm.scaled_dot_product_attention(
        query, key, value, is_causal=True, key_mask=real, dropout_p=0.1, seed=step_seed(0)
    )
    out[real[:, None].expand(out.shape[:3])].square().mean().backward()
    hidden = max(t.grad.transpose(1, 2)[~real].abs().max().item() for t in (key, value))
    print(
        f"three sequences of {lengths.tolist()} tokens, padded to 16: hidden keys and values get gradients of {hidden}"
    )
    assert hidden == 0.0

    # The same seed gives the same dropout on every device, and the mask can be had.
    kept = fusednorm.dropout_mask((3, 8, 16, 16), 0.1, step_seed(0))
    dropped = 1 - kept.double().mean()
    print(f"seed {step_seed(0)} dropped {dropped:.1%} of the attention weights, the same ones on every device")


def step_seed(step: int, layer: int = 0, layers: int = 1) -> int:
    """Another seed for each step and layer: one fixed seed would drop the same weights everywhere."""
    return step * layers + layer


if __name__ == "__main__":
    main()
