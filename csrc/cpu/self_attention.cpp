// self_attention on the CPU: softmax(q k^T / sqrt(d)) v per head over packed qkv (attention.h), and its gradient.
#include "launch.h"
#include "ops.h"

namespace crossvit {

namespace {

template <class Args>
Args head_shape(const Tensor& qkv, int64_t num_heads) {
  Args args{};
  args.qkv = qkv.const_data_ptr();
  args.dtype = dtype_of(qkv);
  args.batch = qkv.size(0);
  args.tokens = qkv.size(1);
  args.heads = num_heads;
  args.width = qkv.size(2) / (3 * num_heads);
  args.batch_stride = qkv.stride(0);
  args.token_stride = qkv.stride(1);
  return args;
}

}  // namespace

namespace unchecked {

std::tuple<Tensor, Tensor> self_attention(const Tensor& qkv, int64_t num_heads, bool save) {
  const Tensor dense = dense_rows(qkv);
  auto args = head_shape<AttentionArgs>(dense, num_heads);
  const Tensor out = empty({args.batch, args.tokens, num_heads * args.width}, qkv.scalar_type());
  const Tensor lse = empty_f32({save ? args.batch : 0, num_heads, args.tokens});
  args.out = out.data_ptr();
  args.lse = float_data(lse);
  launch(active().attention, args);
  return {out, lse};
}

}  // namespace unchecked

std::tuple<Tensor, Tensor> self_attention(const Tensor& qkv, int64_t num_heads, bool save) {
  arguments::self_attention(kTaken, qkv, num_heads);
  return unchecked::self_attention(qkv, num_heads, save);
}

Tensor self_attention_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                               int64_t num_heads) {
  arguments::self_attention_backward(kTaken, grad_out, qkv, out, lse, num_heads);
  const Tensor dense = dense_rows(qkv), grad = grad_out.contiguous(), result = out.contiguous();
  auto args = head_shape<AttentionGradArgs>(dense, num_heads);
  const Tensor grad_qkv = empty(qkv.sizes(), qkv.scalar_type());
  args.out = result.const_data_ptr();
  args.grad_out = grad.const_data_ptr();
  args.grad_qkv = grad_qkv.data_ptr();
  args.lse = float_data(lse);
  launch(active().attention_grad, args);
  return grad_qkv;
}

}  // namespace crossvit
