// cls_fusion on the CPU: one direction of CrossViT's fusion for inference, which strings together the projection of the CLS
// token, cls_cross_attention, the output projection and the way back.
#include "ops.h"

namespace crossvit {

namespace {

Tensor cls_fusion(const ClsFusion& a) {
  const auto linear = [](const Tensor& x, const Norm& norm, const LinearParams& linear, const Tensor& residual,
                         ScalarType dtype) {
    const Tensor out = empty({x.size(0), linear.weight.size(0)}, dtype);
    multiply({.out = rows_of(out), .residual = rows_of(residual), .norm = norm, .gelu_in = norm.present}, RowTensor(x),
             linear);
    return out;
  };
  // Between the ops the CLS stays in float32, whatever the model's dtype.
  const Tensor projected = linear(a.cls, norm_of(a.proj_norm, a.eps), a.proj, {}, kFloat32);
  const Tensor attended =
      std::get<0>(cls_cross_attention({projected, a.patches, a.norm, a.q, a.k_weight, a.v, a.num_heads, a.eps, false}));
  const Tensor fused = linear(attended, {}, a.out, projected, kFloat32);
  return linear(fused, norm_of(a.revert_norm, a.eps), a.revert, {}, a.revert.weight.scalar_type());
}

const Library of_cls_fusion = ops().define<cls_fusion>();

}  // namespace

}  // namespace crossvit
