// A pre-norm transformer block in inference, in one call from Python: its four ops behind one another, to the bit. Between
// them Python would take a tenth of the time of a single image.
#include "launch.h"
#include "ops.h"

namespace crossvit {

namespace {

bool goes_with(const Tensor& t, const Tensor& x) {
  return t.defined() && t.scalar_type() == x.scalar_type() && t.device() == x.device() && t.is_dense() && in_memory(t);
}

bool is_vector(const OptionalTensor& t, int64_t size, const Tensor& x) {
  return !t || (t->dim() == 1 && t->size(0) == size && t->is_contiguous() && goes_with(*t, x));
}

bool is_linear(const Tensor& weight, const OptionalTensor& bias, int64_t out, int64_t in, const Tensor& x) {
  return weight.dim() == 2 && weight.size(0) == out && weight.size(1) == in && goes_with(weight, x) &&
         is_vector(bias, out, x);
}

// A factor of this block's, whose x (B, N, D) has three dimensions: (B, 1, 1) or (D,).
bool is_per_sample(const OptionalTensor& t) { return t && t->dim() == 3; }

bool is_scale(const OptionalTensor& t, const Tensor& x) {
  if (!is_per_sample(t)) return is_vector(t, x.size(2), x);
  return t->size(0) == x.size(0) && t->numel() == x.size(0) && goes_with(*t, x);
}

}  // namespace

OptionalTensor transformer_block(const Tensor& x, const Tensor& norm1_weight, const OptionalTensor& norm1_bias,
                                 double eps1, const Tensor& qkv_weight, const OptionalTensor& qkv_bias,
                                 int64_t num_heads, const Tensor& proj_weight, const OptionalTensor& proj_bias,
                                 const OptionalTensor& scale1, const Tensor& norm2_weight,
                                 const OptionalTensor& norm2_bias, double eps2, const Tensor& w1,
                                 const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
                                 const OptionalTensor& scale2) {
  if (!x.defined() || x.dim() != 3 || x.numel() == 0 || !kTaken.takes(x.scalar_type()) || !goes_with(x, x)) return {};
  const int64_t width = x.size(2), hidden = w1.dim() == 2 ? w1.size(0) : 0;
  const bool fits = num_heads > 0 && width % num_heads == 0 && hidden > 0 && eps1 >= 0 && eps2 >= 0 &&
                    is_vector(norm1_weight, width, x) && is_vector(norm1_bias, width, x) &&
                    is_linear(qkv_weight, qkv_bias, 3 * width, width, x) &&
                    is_linear(proj_weight, proj_bias, width, width, x) && is_scale(scale1, x) &&
                    is_vector(norm2_weight, width, x) && is_vector(norm2_bias, width, x) &&
                    is_linear(w1, b1, hidden, width, x) && is_linear(w2, b2, width, hidden, x) && is_scale(scale2, x);
  if (!fits) return {};
  const Tensor qkv = std::get<0>(
      unchecked::layer_norm_linear(x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, eps1, false, false, false));
  const Tensor heads = std::get<0>(unchecked::self_attention(qkv, num_heads, false));
  const Tensor sum = unchecked::linear_residual(heads, proj_weight, proj_bias, x, scale1, is_per_sample(scale1));
  return std::get<0>(unchecked::layer_norm_mlp(sum, norm2_weight, norm2_bias, w1, b1, w2, b2, eps2, scale2,
                                               is_per_sample(scale2), false));
}

}  // namespace crossvit
