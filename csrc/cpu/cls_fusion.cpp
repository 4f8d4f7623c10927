// cls_fusion on the CPU: one direction of CrossViT's fusion for inference, which strings together the projection of the CLS
// token, cls_cross_attention, the output projection and the way back.
#include "linear_rows.h"
#include "ops.h"

namespace crossvit {

Tensor cls_fusion(const Tensor& cls, const Tensor& patches, const Tensor& proj_norm_weight,
                  const OptionalTensor& proj_norm_bias, const Tensor& proj_weight, const OptionalTensor& proj_bias,
                  const Tensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& q_weight,
                  const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                  const OptionalTensor& v_bias, const Tensor& out_weight, const OptionalTensor& out_bias,
                  const Tensor& revert_norm_weight, const OptionalTensor& revert_norm_bias, const Tensor& revert_weight,
                  const OptionalTensor& revert_bias, int64_t num_heads, double eps) {
  arguments::cls_fusion(kTaken, cls, patches, proj_norm_weight, proj_norm_bias, proj_weight, proj_bias, norm_weight,
                        norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias, out_weight, out_bias,
                        revert_norm_weight, revert_norm_bias, revert_weight, revert_bias, num_heads, eps);
  // Between the ops the CLS stays in float32, whatever the model's dtype.
  const Tensor projected =
      linear_rows(cls, norm_of(proj_norm_weight, proj_norm_bias, eps), true, proj_weight, proj_bias, {}, kFloat32);
  const Tensor attended = std::get<0>(unchecked::cls_cross_attention(
      projected, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias, num_heads, eps, false));
  const Tensor fused = linear_rows(attended, Norm{}, false, out_weight, out_bias, projected, kFloat32);
  return linear_rows(fused, norm_of(revert_norm_weight, revert_norm_bias, eps), true, revert_weight, revert_bias, {},
                     revert_weight.scalar_type());
}

}  // namespace crossvit
