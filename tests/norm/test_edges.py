"""Edges that once failed: each test is named by the property that holds."""

from __future__ import annotations

import torch
from oracle import keep_mask

import fusednorm


def test_unused_norm_leaves_the_stream_gradient_alone(using, device):
    """An unused `normed` gives its weight no gradient, and its NaN rows do not reach the stream's."""
    x = torch.randn(3, 8, device=device)
    x[0, 0] = float("inf")
    x.requires_grad_()
    residual = torch.randn(3, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    with using:
        _, z = fusednorm.add_layer_norm(x, residual, 8, weight)
    cotangent = torch.randn(3, 8, device=device)
    z.backward(cotangent)
    assert torch.equal(x.grad, cotangent) and torch.equal(residual.grad, cotangent)
    assert weight.grad is None


def test_dropped_path_gives_zero_gradient_of_an_infinite_cotangent(using, device):
    seed = next(s for s in range(99) if keep_mask(2, 1, 0.5, s, stream=1)[:, 0].tolist() == [False, True])
    x = torch.randn(2, 8, device=device, requires_grad=True)
    residual = torch.randn(2, 8, device=device)
    with using:
        normed, z = fusednorm.add_layer_norm(x, residual, 8, drop_path_p=0.5, seed=seed)
    cotangent = torch.ones(2, 8, device=device)
    cotangent[0, 0] = float("inf")
    torch.autograd.backward([normed, z], [torch.randn(2, 8, device=device), cotangent])
    assert torch.equal(x.grad[0], torch.zeros(8, device=device))
    assert x.grad[1].isfinite().all()


def test_eps_none_is_that_of_the_stream(using, device):
    """A float64 stream is normalized in float64, with float64's epsilon."""
    x = torch.full((1, 4), 1e-6, device=device)
    with using:
        normed, _ = fusednorm.add_rms_norm(x, torch.zeros(1, 4, dtype=torch.float64, device=device), 4)
    # 1e-6 / sqrt(1e-12 + 2.2e-16); float32's epsilon would give 3e-3
    torch.testing.assert_close(normed, torch.full((1, 4), 0.99989, device=device), rtol=1e-5, atol=0)


def test_subnormal_variance_is_not_taken_for_zero(using, device):
    """eps = 0 and a variance of 1e-40: a GPU's approximate rsqrt flushes it, and gives infinity."""
    x = torch.linspace(-1.7e-20, 1.7e-20, 64, device=device).expand(3, 64).contiguous()
    with using:
        normed = fusednorm.layer_norm(x, 64, eps=0.0)
    exact = torch.nn.functional.layer_norm(x.double() * 1e20, (64,), eps=0.0).float()
    torch.testing.assert_close(normed, exact, rtol=1e-3, atol=0)


def test_memory_efficient_keeps_z_where_a_gradient_is_finer_than_normed(using, device):
    """A bfloat16 x̂ would be seen in a float32 gradient."""
    x = torch.randn(64, 256, device=device).bfloat16().requires_grad_()
    residual = torch.randn(64, 256, device=device, requires_grad=True)
    weight = torch.ones(256, device=device, requires_grad=True)
    gradients = []
    for memory_efficient in (False, True):
        with using:
            outputs = fusednorm.add_layer_norm(x, residual, 256, weight, memory_efficient=memory_efficient)
        cotangents = [torch.randn(o.shape, generator=torch.Generator().manual_seed(3)).to(o) for o in outputs]
        gradients.append(torch.autograd.grad(outputs, (x, residual, weight), cotangents))
    for kept, rebuilt in zip(*gradients):
        assert torch.equal(kept, rebuilt)


def test_memory_efficient_on_meta_tensors():
    module = fusednorm.AddLayerNorm(8, memory_efficient=True, device="meta")
    normed, residual = module(torch.empty(2, 8, device="meta"), torch.empty(2, 8, device="meta"))
    assert normed.shape == residual.shape == (2, 8) and normed.is_meta


def test_export_of_dropout_keeps_sizes_dynamic():
    module = fusednorm.AddLayerNorm(8, dropout_p=0.5)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    example = (torch.randn(4, 5, 8), torch.randn(4, 5, 8))
    exported = torch.export.export(module, example, dynamic_shapes=(sizes, sizes)).module()
    assert exported(torch.randn(6, 3, 8), torch.randn(6, 3, 8))[0].shape == (6, 3, 8)


def test_symbolic_trace_takes_the_modules():
    model = torch.nn.Sequential(fusednorm.LayerNorm(8), fusednorm.RMSNorm(8))
    x = torch.randn(2, 8)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_one_tensor_in_two_roles_compiles(using, device):
    weight = torch.randn(8, device=device, requires_grad=True)
    x = torch.randn(2, 8, device=device, requires_grad=True)

    def step(x):
        return fusednorm.add_layer_norm(x, x, 8, weight, weight)[0]

    torch._dynamo.reset()
    with using:
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, step(x))


def test_negative_bit_is_honoured(using, device):
    """`.conj().imag` is a real tensor whose memory holds the negated values."""
    x = torch.randn(3, 8, dtype=torch.complex64, device=device).conj().imag
    assert x.is_neg()
    with using:
        torch.testing.assert_close(fusednorm.layer_norm(x, 8), fusednorm.layer_norm(x.resolve_neg(), 8))


def test_batched_cotangents_of_a_forced_provider(using, device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    cotangents = torch.randn(4, 3, 8, device=device)
    with using:
        normed, _ = fusednorm.add_layer_norm(x, x.detach(), 8)
    batched = torch.autograd.grad(normed, x, cotangents, is_grads_batched=True, retain_graph=True)[0]
    singly = [torch.autograd.grad(normed, x, cotangent, retain_graph=True)[0] for cotangent in cotangents]
    torch.testing.assert_close(batched, torch.stack(singly))
