"""Ask which code serves a model's calls, and decide it yourself."""

import torch

import fusednorm


def main() -> None:
    torch.manual_seed(0)
    layer = fusednorm.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    x = torch.randn(2, 16, 64)
    print("available here:", ", ".join(fusednorm.available_providers()))
    print(fusednorm.explain(layer, x))  # each call, who serves it, and why nobody else

    layer.eval()
    automatic = layer(x)
    with fusednorm.use_provider("torch"):  # torch's own operators: what the others are compared with
        torch.testing.assert_close(layer(x), automatic)
    with fusednorm.batch_invariant():  # a row's norm never hangs on its batch
        assert torch.equal(layer.norm1(x)[:1], layer.norm1(x[:1]))


if __name__ == "__main__":
    main()
