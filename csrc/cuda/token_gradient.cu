// The tokens' part of cls_cross_attention's gradient: one more pass over them, steps of 16 tokens as in token_pass.cu. The
// rows u_h and dz_h of 8 heads are the 16 rows of one product, which gives scores and dp of a token to the same lane.
#include "cuda/cls_cross_attention_backward.h"

#include <cassert>
#include <cuda/ptx.cuh>

#include "cuda/launch.cuh"
#include "cuda/token_gradient.cuh"
#include "cuda/token_plan.h"
#include "cuda/token_tiles.cuh"
#include "cuda/warp_product.cuh"

namespace crossvit::cuda {

namespace {

template <class T, class X, bool kTf32, int kHeadGroups>
__global__ void __launch_bounds__(kTokenThreads, kHeadGroups == 1 && sizeof(T) == 2 ? kTokenBlocks : 1)
    token_gradient_kernel(const TokenGradient a) {
  using Steps = GradientSteps<T, X, kTf32, kHeadGroups>;
  constexpr int kHeads = Steps::kHeads;
  const TokenPlan& plan = a.plan;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = blockIdx.x % plan.splits;
  const std::int64_t image = blockIdx.x / plan.splits;
  const int heads = a.tokens.heads, tokens = a.tokens.patches + 1, first_head = a.set * kHeads;
  unsigned char* const memory = ptx::shared_memory();
  const GradientMemory at(plan, sizeof(T));
  const TokenRing<X> ring(a.tokens, plan, at.rings.in<unsigned char>(memory), image);
  const Steps steps{a,
                    ring,
                    image,
                    a.tokens.width,
                    heads,
                    tokens,
                    first_head,
                    min(heads - first_head, kHeads),
                    row_stride(plan.columns, sizeof(T)),
                    plan.row_bytes / static_cast<int>(sizeof(T)),
                    at.u_grad_context.in<T>(memory),
                    at.weights.in<T>(memory) + warp * (2 * kHeads * kStepTokens),
                    at.vectors.in<float>(memory),
                    at.sums.in<float>(memory) + warp * (2 * kStepTokens),
                    at.exchange.in<float>(memory),
                    lane,
                    lane / 4,
                    lane % 4};
  float grad_u[kTiles<kHeadGroups>][kHeadGroups][4] = {};
  float rest[kHeadGroups] = {};
  const int first_step = split * plan.steps;
  const int last_step = min(first_step + plan.steps, (tokens + kStepTokens - 1) / kStepTokens);
  const auto load_u_grad_context = [&] { steps.load_u_grad_context(); };
  ring.for_each_step(first_step, last_step, load_u_grad_context, [&](int step, unsigned char* buffer, bool there) {
    const int first_token = step * kStepTokens;
    float p[kHeadGroups][4], s[kHeadGroups][2][4] = {}, ds[2][4] = {}, along_one[4] = {}, along_x[4] = {};
    steps.load_probs(p, first_token, there);
    steps.normalize(buffer, first_token, there);
    T* const x = reinterpret_cast<T*>(buffer) + ring.first_tile * 16;
    steps.score(s, x);
    __syncwarp();  // of the step before, everyone has read weights and sums
    steps.weigh(s, p, first_token, there, ds, rest, along_one, along_x);
    {
      const TokenWeights<T, kTf32, kHeadGroups> grad_scores(ds);
#pragma unroll
      for (int j = 0; j < kTiles<kHeadGroups>; j++)
        if (j < ring.tiles) grad_scores.multiply(grad_u[j], x + j * 16, steps.x_stride, ds);
    }
    if (!a.grad_patches.data && !(a.grad_normalized && step == 0)) return;
    steps.share_sums(along_one, along_x);
    steps.make_gradients(x, first_token, there);
    if (!steps.in_place() || !a.grad_patches.data) return;
    __syncwarp();
    steps.store_rows(x, first_token, there);
  });
  __syncthreads();
  steps.join_warp_groups(grad_u, rest, split, at.grad_u.in<float>(memory));
}

}  // namespace

TokenPlan plan_token_gradient(const Tokens& tokens, DType dtype) {
  return plan_tokens(tokens, dtype, [&](const TokenPlan& plan) {
    const GradientMemory at(plan, dtype == DType::float32 ? 4 : 2);
    assert(in_order(at.u_grad_context, at.vectors, at.weights, at.sums, at.rings, at.exchange));
    assert(in_order(at.sums, at.grad_u));
    return at.total;
  });
}

Error token_gradient(const TokenGradient& args, Stream stream) {
  return with_tokens(args, [&]<class T, class X, bool kTf32, int kHeadGroups>() {
    return launch(token_gradient_kernel<T, X, kTf32, kHeadGroups>, args.tokens.batch * args.plan.splits, kTokenThreads,
                  args.plan.shared, stream, args);
  });
}

}  // namespace crossvit::cuda
