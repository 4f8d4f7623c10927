// Arguments of cls_cross_attention and cls_fusion as their kernels take them; each owns the copies that it had to make.
#pragma once

#include <initializer_list>
#include <vector>

#include "cuda/check.h"
#include "cuda/cls_cross_attention.h"

namespace crossvit::cuda {

// 1-D parameters, contiguous.
class Parameters {
 public:
  Parameters(std::initializer_list<OptionalTensor> tensors) {
    for (const OptionalTensor& t : tensors) tensors_.push_back(t ? OptionalTensor(t->contiguous()) : t);
  }
  Vector operator[](std::size_t i) const { return vector_of(tensors_[i]); }

 private:
  std::vector<OptionalTensor> tensors_;
};

// Weights of Linears, contiguous.
class Weights {
 public:
  Weights(std::initializer_list<Tensor> tensors) {
    for (const Tensor& t : tensors) tensors_.push_back(t.contiguous());
  }
  const void* operator[](std::size_t i) const { return tensors_[i].const_data_ptr(); }
  bool aligned() const {
    for (const Tensor& t : tensors_)
      if (!aligned_to_16(t)) return false;
    return true;
  }

 private:
  std::vector<Tensor> tensors_;
};

// [cls || patches] with dense rows.
struct DenseTokens {
  Tensor cls, patches;
  Tokens tokens;

  DenseTokens(const Tensor& cls_, const Tensor& patches_, std::int64_t num_heads)
      : cls(dense_rows(cls_)), patches(dense_rows(patches_)) {
    TORCH_CHECK(patches.size(1) < (std::int64_t{1} << 31) - 32, "too many patches");
    tokens.cls = cls.const_data_ptr();
    tokens.cls_type = type_of(cls);
    tokens.cls_stride = cls.stride(0);
    tokens.data = patches.const_data_ptr();
    tokens.type = type_of(patches);
    tokens.batch_stride = patches.stride(0);
    tokens.token_stride = patches.stride(1);
    tokens.aligned = aligned_to_16(patches);
    tokens.batch = patches.size(0);
    tokens.patches = static_cast<int>(patches.size(1));
    tokens.width = static_cast<int>(patches.size(2));
    tokens.heads = static_cast<int>(num_heads);
  }

  // The CLS token's part of a kernel's arguments.
  template <class Args>
  void fill(Args& args) const {
    args.cls = tokens.cls;
    args.cls_type = tokens.cls_type;
    args.cls_stride = tokens.cls_stride;
    args.batch = tokens.batch;
    args.width = tokens.width;
    args.heads = tokens.heads;
  }
};

inline void check_width(std::int64_t shared, std::int64_t width) {
  TORCH_CHECK(shared <= kSharedMemory, "cls_cross_attention's CUDA kernels hold tokens in shared memory; ", width,
              " elements are too wide for it");
}

}  // namespace crossvit::cuda
