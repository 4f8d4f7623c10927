"""cls_fusion on Triton: a direction of CrossViT's fusion in four launches; see _token_pass.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cls_rows import (
    ROWS,
    absorb_query,
    affine,
    cls_default,
    dense,
    dense_rows,
    head_block,
    load_tile,
    load_vector,
    power_of_two,
    row_statistics,
)
from ._launch import cdiv, configuration, dot_precision, launch
from ._math import gelu, product
from ._rows import block_of
from ._token_pass import pass_tokens


@triton.jit
def fusion_projection(
    cls_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    batch,
    cls_stride,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Linear(gelu(LayerNorm(cls))) of 16 images and BLOCK_E columns, in float32."""
    rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    valid = rows < batch
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    starts = cls_ptr + rows * cls_stride
    first, shift, rstd = row_statistics(starts, valid, eps, D, BLOCK_K)
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    out = tl.zeros((16, BLOCK_E), tl.float32)
    for k in tl.range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        x = load_tile(starts[:, None] + c[None, :], valid, c < D, True, MASK_K).to(tl.float32)
        x = ((x - first[:, None]) - shift[:, None]) * rstd[:, None]
        if MASK_K:
            x = tl.where((c < D)[None, :], x, 0.0)
        x = gelu(affine(x, norm_weight_ptr, norm_bias_ptr, c, c < D)).to(weight_ptr.dtype.element_ty)
        weight = load_tile(weight_ptr + e[:, None] * D + c[None, :], e < E, c < D, E % BLOCK_E != 0, MASK_K)
        out = product(x, weight.T, out, PRECISION)
    out += load_vector(bias_ptr, e, e < E, 0.0)[None, :]
    tl.store(out_ptr + rows[:, None] * E + e[None, :], out, mask=valid[:, None] & (e < E)[None, :])


@triton.jit
def _linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    valid,
    D: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out = [residual +] Linear(x) for these 16 rows. One loop over all columns and chunks, so that the weights never
    stop coming."""
    chunks: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    blocks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    out = tl.zeros((16, BLOCK_E), tl.float32)
    for step in tl.range(0, blocks * chunks):
        k = step % chunks
        c = k * BLOCK_K + tl.arange(0, BLOCK_K)
        e = step // chunks * BLOCK_E + tl.arange(0, BLOCK_E)
        x = load_tile(x_ptr + rows[:, None] * D + c[None, :], valid, c < D, True, D % BLOCK_K != 0)
        weight = load_tile(weight_ptr + e[:, None] * D + c[None, :], e < E, c < D, E % BLOCK_E != 0, D % BLOCK_K != 0)
        out = product(x, weight.T, tl.where(k == 0, 0.0, out), PRECISION)
        if k == chunks - 1:
            at = rows[:, None] * E + e[None, :]
            inside = valid[:, None] & (e < E)[None, :]
            y = out + load_vector(bias_ptr, e, e < E, 0.0)[None, :]
            if residual_ptr is not None:
                y += tl.load(residual_ptr + at, mask=inside, other=0.0)
            tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def fusion_tail(
    context_ptr,
    softmax_ptr,
    projected_ptr,
    fused_ptr,
    narrow_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    v_weight_ptr,
    v_bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    revert_norm_weight_ptr,
    revert_norm_bias_ptr,
    revert_weight_ptr,
    revert_bias_ptr,
    out_ptr,
    batch,
    splits,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """From the contexts to the end of the fusion, for 16 images, or for one whose tokens were split over programs.

    Between the steps rows lie in scratch of this program alone: `fused` in float32, `narrow` in the weights' dtype.
    """
    SPLIT: tl.constexpr = SPLITS_BLOCK > 1
    if SPLIT:
        rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 16)
        valid = tl.arange(0, 16) == 0
    else:
        rows = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
        valid = rows < batch
    dtype: tl.constexpr = v_weight_ptr.dtype.element_ty
    HEADS: tl.constexpr = D // HEAD
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    chunks: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    blocks: tl.constexpr = (HEAD + HEAD_BLOCK - 1) // HEAD_BLOCK
    s = tl.arange(0, SPLITS_BLOCK)

    out = tl.zeros((16, HEAD_BLOCK), tl.float32)
    for step in tl.range(0, HEADS * blocks * chunks):
        k = step % chunks
        head = step // (blocks * chunks)
        c = k * BLOCK_K + tl.arange(0, BLOCK_K)
        j = step // chunks % blocks * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
        if SPLIT:
            of_split = tl.program_id(0).to(tl.int64) * splits + s
            at = softmax_ptr + of_split * 2 * HEADS + head
            highest = tl.load(at, mask=s < splits, other=float("-inf"))
            totals = tl.load(at + HEADS, mask=s < splits, other=0.0)
            top = tl.max(highest, 0)
            shares = tl.exp(highest - tl.where(top == float("-inf"), 0.0, top))
            shares = tl.where(s < splits, shares, 0.0)
            z = load_tile(
                context_ptr + ((of_split * HEADS + head) * D)[:, None] + c[None, :], s < splits, c < D, True, MASK_K
            )
            z = tl.sum(z * shares[:, None], 0) / tl.sum(shares * totals, 0)
            z = tl.broadcast_to(z[None, :], (16, BLOCK_K))
        else:
            z = context_ptr + ((rows * HEADS + head) * D)[:, None] + c[None, :]
            z = load_tile(z, valid, c < D, True, MASK_K)
        y = affine(z, norm_weight_ptr, norm_bias_ptr, c, c < D).to(dtype)
        weights = v_weight_ptr + (head * HEAD + j)[:, None] * D + c[None, :]
        weight = load_tile(weights, j < HEAD, c < D, HEAD % HEAD_BLOCK != 0, MASK_K)
        out = product(y, weight.T, tl.where(k == 0, 0.0, out), PRECISION)
        if k == chunks - 1:
            attended = out + load_vector(v_bias_ptr, head * HEAD + j, j < HEAD, 0.0)[None, :]
            tl.store(
                narrow_ptr + rows[:, None] * D + (head * HEAD + j)[None, :],
                attended.to(dtype),
                mask=valid[:, None] & (j < HEAD)[None, :],
            )
    tl.debug_barrier()

    _linear(
        narrow_ptr,
        out_weight_ptr,
        out_bias_ptr,
        projected_ptr,
        fused_ptr,
        rows,
        valid,
        D,
        D,
        PRECISION,
        BLOCK_K,
        BLOCK_E,
    )
    tl.debug_barrier()

    starts = fused_ptr + rows * D
    first, shift, rstd = row_statistics(starts, valid, eps, D, BLOCK_K)
    for k in tl.static_range(0, D, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        x = load_tile(starts[:, None] + c[None, :], valid, c < D, True, MASK_K)
        x = ((x - first[:, None]) - shift[:, None]) * rstd[:, None]
        x = gelu(affine(x, revert_norm_weight_ptr, revert_norm_bias_ptr, c, c < D))
        tl.store(narrow_ptr + rows[:, None] * D + c[None, :], x.to(dtype), mask=valid[:, None] & (c < D)[None, :])
    tl.debug_barrier()
    _linear(
        narrow_ptr, revert_weight_ptr, revert_bias_ptr, None, out_ptr, rows, valid, D, E, PRECISION, BLOCK_K, BLOCK_E
    )


def forward(
    cls: Tensor,
    patches: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    revert_norm_weight: Tensor,
    revert_norm_bias: Tensor | None,
    revert_weight: Tensor,
    revert_bias: Tensor | None,
    num_heads: int,
    eps: float,
    save: bool,
) -> Tensor:
    """The op's forward; `save` has nothing to save."""
    cls, patches = dense_rows(cls), dense_rows(patches)
    proj_norm_weight, proj_norm_bias, proj_weight, proj_bias = dense(
        proj_norm_weight, proj_norm_bias, proj_weight, proj_bias
    )
    norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias = dense(
        norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias
    )
    out_weight, out_bias, revert_weight, revert_bias = dense(out_weight, out_bias, revert_weight, revert_bias)
    revert_norm_weight, revert_norm_bias = dense(revert_norm_weight, revert_norm_bias)
    (batch, own), width, dtype = cls.shape, patches.shape[2], q_weight.dtype
    precision, head = dot_precision(dtype), width // num_heads

    # The CLS stays in float32 between the steps, whatever the model's dtype.
    projected = cls.new_empty((batch, width), dtype=torch.float32)
    default = {"BLOCK_E": 32, **cls_default(own, 1, dtype)}
    chosen = configuration("fusion_projection", own, dtype, default)
    launch(
        fusion_projection,
        (cdiv(batch, ROWS), cdiv(width, chosen["BLOCK_E"])),
        chosen,
        cls_ptr=cls,
        norm_weight_ptr=proj_norm_weight,
        norm_bias_ptr=proj_norm_bias,
        weight_ptr=proj_weight,
        bias_ptr=proj_bias,
        out_ptr=projected,
        batch=batch,
        cls_stride=cls.stride(0),
        eps=eps,
        D=own,
        E=width,
        PRECISION=precision,
    )
    key_query = absorb_query(projected, norm_weight, norm_bias, q_weight, q_bias, k_weight, num_heads, eps, None)
    _, context, softmax, splits = pass_tokens(
        projected, patches, norm_weight, key_query, eps, dtype, (None, None, None)
    )
    out = revert_weight.new_empty((batch, own))
    launch(
        fusion_tail,
        (cdiv(batch, ROWS) if splits == 1 else batch,),
        configuration("fusion_tail", width, dtype, tail_default(width, dtype)),
        context_ptr=context,
        softmax_ptr=softmax,
        projected_ptr=projected,
        fused_ptr=torch.empty_like(projected),
        narrow_ptr=torch.empty_like(projected, dtype=dtype),
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        v_weight_ptr=v_weight,
        v_bias_ptr=v_bias,
        out_weight_ptr=out_weight,
        out_bias_ptr=out_bias,
        revert_norm_weight_ptr=revert_norm_weight,
        revert_norm_bias_ptr=revert_norm_bias,
        revert_weight_ptr=revert_weight,
        revert_bias_ptr=revert_bias,
        out_ptr=out,
        batch=batch,
        splits=splits,
        eps=eps,
        D=width,
        E=own,
        HEAD=head,
        HEAD_BLOCK=head_block(head),
        SPLITS_BLOCK=power_of_two(splits),
        PRECISION=precision,
    )
    return out


def tail_default(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Of fusion_tail: one program streams all weights, so it has more warps and more loads on their way."""
    return {
        "BLOCK_K": block_of(width, 128 if dtype.itemsize == 2 else 64, 64),
        "BLOCK_E": 64,
        "num_warps": 8,
        "num_stages": 4,
    }
