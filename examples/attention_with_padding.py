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
    assert not key.grad[1, :, 9:].any() and not value.grad[1, :, 9:].any()  # what is hidden gets no gradient

    # The same seed gives the same dropout on every device, and the mask can be had.
    kept = fusednorm.dropout_mask((3, 8, 16, 16), 0.1, step_seed(0))
    print(f"{1 - kept.double().mean():.1%} of the weights were dropped")


def step_seed(step: int, layer: int = 0, layers: int = 1) -> int:
    """Another seed for each step and layer: one fixed seed would drop the same weights everywhere."""
    return step * layers + layer


if __name__ == "__main__":
    main()
