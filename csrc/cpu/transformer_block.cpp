// A pre-norm transformer block in inference, in one call from Python: its four ops behind one another, to the bit. Between
// them Python would take a tenth of the time of a single image.
#include "ops.h"

namespace crossvit {

namespace {

// On the CPU alone, and of no public op: see crossvit_kernels/ops/transformer_block.py.
struct TransformerBlock {
  static constexpr const char* schema =
      "transformer_block(Tensor x, Tensor norm1_weight, Tensor? norm1_bias, float eps1, Tensor qkv_weight, Tensor? "
      "qkv_bias, int num_heads, Tensor proj_weight, Tensor? proj_bias, Tensor? scale1, Tensor norm2_weight, Tensor? "
      "norm2_bias, float eps2, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? scale2) -> Tensor?";
  const Tensor& x;
  NormParams norm1;
  double eps1;
  LinearParams qkv;
  int64_t num_heads;
  LinearParams proj;
  const OptionalTensor& scale1;
  NormParams norm2;
  double eps2;
  LinearParams first, second;
  const OptionalTensor& scale2;

  // Whether every argument is as the four ops want it, and of one dtype.
  bool fits() const {
    if (!x.defined() || x.dim() != 3 || x.numel() == 0 || !taken().takes(x.scalar_type()) || !goes_with_x(x))
      return false;
    const int64_t width = x.size(2), hidden = first.weight.dim() == 2 ? first.weight.size(0) : 0;
    return num_heads > 0 && width % num_heads == 0 && hidden > 0 && eps1 >= 0 && eps2 >= 0 && is_norm(norm1) &&
           is_linear(qkv, 3 * width, width) && is_linear(proj, width, width) && is_scale(scale1) && is_norm(norm2) &&
           is_linear(first, hidden, width) && is_linear(second, width, hidden) && is_scale(scale2);
  }
  // A factor: of x (B, N, D) (B, 1, 1) or (D,).
  static ScaleParams scale(const OptionalTensor& t) { return {t, t && t->dim() == 3}; }

 private:
  bool goes_with_x(const Tensor& t) const {
    return t.defined() && t.scalar_type() == x.scalar_type() && t.device() == x.device() && t.is_dense() &&
           in_memory(t);
  }
  bool is_vector(const Tensor& t, int64_t size) const {
    return t.dim() == 1 && t.size(0) == size && t.is_contiguous() && goes_with_x(t);
  }
  bool is_vector(const OptionalTensor& t, int64_t size) const { return !t || is_vector(*t, size); }
  bool is_norm(const NormParams& norm) const {
    return is_vector(norm.weight, x.size(2)) && is_vector(norm.bias, x.size(2));
  }
  bool is_linear(const LinearParams& linear, int64_t out, int64_t in) const {
    const Tensor& weight = linear.weight;
    return weight.dim() == 2 && weight.size(0) == out && weight.size(1) == in && goes_with_x(weight) &&
           is_vector(linear.bias, out);
  }
  bool is_scale(const OptionalTensor& t) const {
    if (!scale(t).per_sample) return is_vector(t, x.size(2));
    return t->size(0) == x.size(0) && t->numel() == x.size(0) && goes_with_x(*t);
  }
};

// Without a value where an argument is not what it should be: then the four ops, called in turn, say so or do without.
OptionalTensor transformer_block(const TransformerBlock& a) {
  if (!a.fits()) return {};
  const Tensor qkv = std::get<0>(layer_norm_linear({a.x, a.norm1, a.qkv, a.eps1, false, false, false}));
  const Tensor heads = std::get<0>(self_attention({qkv, a.num_heads, false}));
  const Tensor sum = linear_residual({heads, a.proj, a.x, a.scale(a.scale1)});
  return std::get<0>(layer_norm_mlp({sum, a.norm2, a.first, a.second, a.eps2, a.scale(a.scale2), false}));
}

const Library of_transformer_block = ops().define<transformer_block>();

}  // namespace

}  // namespace crossvit
