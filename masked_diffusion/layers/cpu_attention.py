"""Attention with a bias in bfloat16 on a CPU: matrix products of all heads, and what lies between them.

PyTorch's attention has no kernel for a bias that is trained; what it runs in its place converts bfloat16 to float32,
also on a processor with instructions for bfloat16. Here, products are computed in the format of their inputs, and
backward reuses the probabilities of forward. `torch.compile` sees operators only: its softmax is slower on a CPU.
"""

from typing import Any

import torch


class BiasedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d) + bias) v.

    :param q, k, v: (N, heads, K, d) of one dtype. :param bias: (N or 1, heads, K, K).
    :return: (N, heads, K, d), laid out so that heads join without a copy.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # a product would copy a transposed view more slowly
        out, weights = attend(q, k, v, bias)
        ctx.save_for_backward(q, k, v, weights)
        ctx.bias_like = (len(bias), bias.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attend_backward(grad_out.contiguous(), *ctx.saved_tensors, *ctx.bias_like)


@torch.library.custom_op("masked_diffusion::cpu_attention", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:return: the output, and the (N, heads, K, K) weights with which it adds up v."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = scores.add_(bias.to(q.dtype).contiguous()).softmax(-1)
    out = q.new_empty(_order_of_heads(q)).transpose(1, 2)
    return out.copy_(weights @ v), weights


@attend.register_fake
def _(q, k, v, bias):
    return q.new_empty(_order_of_heads(q)).transpose(1, 2), q.new_empty(*q.shape[:3], k.shape[2])


def _order_of_heads(q: torch.Tensor) -> tuple[int, ...]:
    """(N, K, heads, d)."""
    return q.shape[0], q.shape[2], q.shape[1], q.shape[3]


@torch.library.custom_op("masked_diffusion::cpu_attention_backward", mutates_args=())
def attend_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    num_biases: int,
    bias_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:return: the gradients of q, k and v, and of a bias of `num_biases` samples."""
    scale = q.shape[-1] ** -0.5
    grad_v = weights.transpose(-1, -2) @ grad_out
    grad_weights = grad_out @ v.transpose(-1, -2)
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_q, grad_k = (grad_scores @ k).mul_(scale), (grad_scores.transpose(-1, -2) @ q).mul_(scale)
    shared = num_biases < len(q)
    grad_bias = grad_scores.sum(0, keepdim=True, dtype=bias_dtype) if shared else grad_scores.to(bias_dtype, copy=True)
    return grad_q, grad_k, grad_v, grad_bias


@attend_backward.register_fake
def _(grad_out, q, k, v, weights, num_biases, bias_dtype):
    grad_bias = weights.new_empty(num_biases, *weights.shape[1:], dtype=bias_dtype)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), grad_bias
