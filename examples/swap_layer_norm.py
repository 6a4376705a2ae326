"""Swap every nn.LayerNorm of a model that exists for fusednorm's: same weights, same state_dict, same results."""

import torch
from torch import nn

import fusednorm


def swap_layer_norms(model: nn.Module) -> nn.Module:
    """Replace the layer norms in place; the parameters are kept, so an optimizer that has them keeps working."""
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm) is nn.LayerNorm:
                faster = fusednorm.LayerNorm(norm.normalized_shape, norm.eps, device="meta")
                faster.weight, faster.bias = norm.weight, norm.bias
                setattr(module, name, faster.train(norm.training))
    return model


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8))
    )
    x, state = torch.randn(32, 16), model.state_dict()
    before = model(x)
    swap_layer_norms(model)
    after = model(x)
    torch.testing.assert_close(after, before)
    model.load_state_dict(state)  # checkpoints of the old model load as before
    model(x).square().mean().backward()
    swapped = [name for name, module in model.named_modules() if isinstance(module, fusednorm.LayerNorm)]
    print(f"modules {', '.join(swapped)} are fusednorm.LayerNorm now, and the old state_dict loads")
    print(f"largest difference of the outputs before and after: {(after - before).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
