"""Load a trained nn.Transformer into fusednorm.Transformer and train on: arguments and state_dict are torch's."""

import torch
from torch import nn

import fusednorm

SIZES = {"d_model": 64, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 128}


def main() -> None:
    torch.manual_seed(0)
    theirs = nn.Transformer(**SIZES, batch_first=True)  # yours, from a checkpoint
    model = fusednorm.Transformer(**SIZES, batch_first=True)
    model.load_state_dict(theirs.state_dict())

    source, target = torch.randn(3, 10, 64), torch.randn(3, 7, 64)
    padding = torch.arange(10) >= torch.tensor([10, 6, 3])[:, None]  # as in torch, True hides
    masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    masks |= {"tgt_mask": model.generate_square_subsequent_mask(7), "tgt_is_causal": True}
    ours, torchs = model.eval()(source, target, **masks), theirs.eval()(source, target, **masks)
    torch.testing.assert_close(ours, torchs)
    print(f"same weights, same masks: largest difference from torch's output {(ours - torchs).abs().max().item():.1e}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        loss = model.train()(source, target, **masks).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"training goes on, step {step}: loss {loss.item():.4f}")
    theirs.load_state_dict(model.state_dict())
    print("the trained weights are back in torch.nn.Transformer")


if __name__ == "__main__":
    main()
