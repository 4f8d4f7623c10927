// self_attention on the CPU: softmax(q k^T / sqrt(d)) v per head over packed qkv (attention.h), and its gradient.
#include "ops.h"

namespace crossvit {

SelfAttention::Results self_attention(const SelfAttention& a) {
  const Tensor qkv = dense_rows(a.qkv);
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), width = qkv.size(2) / 3;
  const Tensor out = empty({batch, tokens, width}, qkv.scalar_type());
  const Tensor lse = empty_f32({a.save ? batch : 0, a.num_heads, tokens});
  launch(active().attention,
         AttentionArgs{qkv.const_data_ptr(), out.data_ptr(), dtype_of(qkv), batch, tokens, a.num_heads,
                       width / a.num_heads, qkv.stride(0), qkv.stride(1), float_data(lse)});
  return {out, lse};
}

namespace {

Tensor self_attention_backward(const SelfAttentionBackward& a) {
  const Tensor qkv = dense_rows(a.qkv), grad_out = a.grad_out.contiguous(), out = a.out.contiguous();
  const Tensor grad_qkv = empty(qkv.sizes(), qkv.scalar_type());
  launch(active().attention_grad,
         AttentionGradArgs{qkv.const_data_ptr(), out.const_data_ptr(), grad_out.const_data_ptr(), grad_qkv.data_ptr(),
                           dtype_of(qkv), qkv.size(0), qkv.size(1), a.num_heads, qkv.size(2) / (3 * a.num_heads),
                           qkv.stride(0), qkv.stride(1), float_data(a.lse)});
  return grad_qkv;
}

const Library of_self_attention = ops().define<self_attention>().define<self_attention_backward>();

}  // namespace

}  // namespace crossvit
