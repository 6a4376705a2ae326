"""Ask which code serves a model's calls, and decide it yourself."""

import torch

import fusednorm


def main() -> None:
    torch.manual_seed(0)
    layer = fusednorm.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    x = torch.randn(2, 16, 64)
    print("providers that can run here:", ", ".join(fusednorm.available_providers()))
    print("a training step of one layer is served by:")
    print(fusednorm.explain(layer, x))  # each call, who serves it, and why nobody else

    layer.eval()
    automatic = layer(x)
    with fusednorm.use_provider("torch"):  # torch's own operators: what the others are compared with
        torchs = layer(x)
    torch.testing.assert_close(torchs, automatic)
    print(f"provider torch gives the same output, to {(torchs - automatic).abs().max().item():.1e}")
    with fusednorm.batch_invariant():  # a row's norm never hangs on its batch
        assert torch.equal(layer.norm1(x)[:1], layer.norm1(x[:1]))
    print("inside batch_invariant() a row's norm has the same bits alone and in its batch")


if __name__ == "__main__":
    main()
