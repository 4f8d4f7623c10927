// Which gradients a backward is asked for, under the names of its op's inputs. A caller gives them as a list of bools in this
// order; the check of the op's arguments (arguments.h) reads the list once.
#pragma once

#include <vector>

#include "torch_c/op.h"

namespace crossvit {

struct LayerNormLinearNeeds {
  bool x = false, norm_weight = false, norm_bias = false, weight = false, bias = false;
  bool any() const { return x || norm_weight || norm_bias || weight || bias; }
};

struct LinearResidualNeeds {
  bool x = false, weight = false, bias = false, scale = false;
};

struct LayerNormMlpNeeds {
  bool x = false, norm_weight = false, norm_bias = false, w1 = false, b1 = false, w2 = false, b2 = false, scale = false;
};

struct ClsCrossAttentionNeeds {
  bool cls = false, patches = false, norm_weight = false, norm_bias = false;
  bool q_weight = false, q_bias = false, k_weight = false, k_bias = false, v_weight = false, v_bias = false;
};

// The gradients themselves; one that is not wanted is not defined.
struct ClsCrossAttentionGradients {
  Tensor cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias;
  // Those that are wanted, in the order of the list.
  std::vector<Tensor> in_order() const {
    std::vector<Tensor> result;
    for (const Tensor* gradient :
         {&cls, &patches, &norm_weight, &norm_bias, &q_weight, &q_bias, &k_weight, &k_bias, &v_weight, &v_bias})
      if (gradient->defined()) result.push_back(*gradient);
    return result;
  }
};

struct PatchEmbedNeeds {
  bool images = false, weight = false, bias = false, cls_token = false, pos_embed = false;
};

}  // namespace crossvit
