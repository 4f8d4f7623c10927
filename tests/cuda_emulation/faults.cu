// The emulation's own test: a kernel of every kind of instruction that it knows, right and with one fault planted at a time.
// Prints a line for each: its name, then "right", "wrong" or what the launch said.
#include <cuda/ptx.cuh>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/types.cuh"

using namespace crossvit;
using namespace crossvit::cuda;

namespace {

enum class Fault {
  none,
  missing_barrier,         // a warp reads what another may not have written
  missing_second_barrier,  // a stage is filled again while another warp may still read it
  missing_wait,            // an asynchronous copy is read while in flight
  missing_lane_sync,       // a lane reads what another of its warp may not have written
  outside_shared,          // a write behind shared memory
  outside_shared_matrix,   // ldmatrix behind shared memory
  misaligned_copy,
  unwritten_output,
  divergent_barrier,  // half of the warps wait at a barrier for the others, which wait for their lanes
  divergent_lanes,    // lanes of a warp meet at different instructions
  forgotten_copies,   // the kernel returns before its copies have landed
  outside_global,     // seen by AddressSanitizer
};

constexpr int kThreads = 128, kRows = 16, kColumns = 8, kDepth = 16, kSteps = 6, kStages = 2;
constexpr int kA = kRows * kDepth, kB = kColumns * kDepth;

template <Fault kFault>
constexpr std::size_t shared_bytes = kStages * (kA + kB) * 2 + kThreads / 32 * 128 * 4;

// y (16, 8) = sum over steps of a_s (16, 16) b_s (8, 16)^T for a (steps, 16, 16), b (steps, 8, 16): each warp multiplies every
// fourth step; then the warps' sums are added, and y is scaled by the sum of its elements' signs (a reduction by shuffles).
template <class T, Fault kFault>
__global__ void product(const T* a, const T* b, float* y) {
  T* stages = reinterpret_cast<T*>(ptx::shared_memory());
  float* sums = reinterpret_cast<float*>(stages + kStages * (kA + kB));
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, group = lane / 4, pair = lane % 4 * 2;

  const auto fetch = [&](int step) {
    T* stage = stages + step % kStages * (kA + kB);
    if (step < kSteps) {
      // The last threads fetch, the first warps multiply.
      const int piece = kThreads - 1 - thread;
      const int shift = kFault == Fault::misaligned_copy && step == 1 ? 1 : 0;
      if (piece < kA / 8) ptx::copy_async(stage + piece * 8, a + step * kA + piece * 8 + shift);
      if (piece >= kA / 8 && piece < (kA + kB) / 8) {
        ptx::copy_async(stage + piece * 8, b + step * kB + piece * 8 - kA);
      }
    }
    ptx::commit_copies();
  };

  float d[4] = {};
  fetch(0);
  for (int step = 0; step < kSteps; ++step) {
    if constexpr (kFault != Fault::missing_second_barrier) __syncthreads();
    fetch(step + 1);
    if constexpr (kFault != Fault::missing_wait) ptx::wait_copies<1>();
    if constexpr (kFault != Fault::missing_barrier) __syncthreads();
    if (step % 4 == warp) {
      const T* stage = stages + step % kStages * (kA + kB);
      std::uint32_t left[4], right[2];
      const int beyond = kFault == Fault::outside_shared_matrix && step == 5 ? 1 << 14 : 0;
      ptx::load_matrices(left, stage + beyond + lane % 16 * kDepth + lane / 16 * 8);
      ptx::load_matrices(right, stage + kA + lane % 8 * kDepth + lane / 8 % 2 * 8);
      ptx::multiply(T(), d, left, right);
    }
  }
  if constexpr (kFault != Fault::forgotten_copies) ptx::wait_copies<0>();
  if constexpr (kFault == Fault::forgotten_copies) fetch(0);

  float* mine = sums + warp * kRows * kColumns;
  for (int i = 0; i < 4; ++i) mine[(group + i / 2 * 8) * kColumns + pair + i % 2] = d[i];
  if constexpr (kFault == Fault::outside_shared) {
    if (thread == 77) sums[kThreads / 32 * 128] = 1;
  }
  if constexpr (kFault == Fault::divergent_barrier) {
    if (warp % 2 || lane < 16) __syncthreads();
  } else {
    __syncthreads();
  }
  float total = 0;
  for (int w = 0; w < kThreads / 32; ++w) total += sums[w * kRows * kColumns + thread];

  // The sum of the signs, within a warp through memory, then by shuffles.
  float sign = total < 0 ? -1.0f : 1.0f;
  __syncthreads();
  sums[thread] = sign;
  if constexpr (kFault != Fault::missing_lane_sync) __syncwarp();
  sign = 0;
  for (int i = 0; i < 4; ++i) sign += sums[warp * 32 + (lane % 8 + 8 * i)];
  if constexpr (kFault == Fault::divergent_lanes) {
    sign += lane < 7 ? __shfl_xor_sync(~0u, sign, 1) : __shfl_down_sync(~0u, sign, 1);
  } else {
    sign += __shfl_xor_sync(~0u, sign, 1);
  }
  sign += __shfl_xor_sync(~0u, sign, 2);
  sign += __shfl_xor_sync(~0u, sign, 4);
  if (kFault == Fault::unwritten_output && thread == 100) return;
  const int at = kFault == Fault::outside_global && thread == 127 ? 128 : thread;
  y[at] = total * sign;
}

template <class T, Fault kFault>
std::string run() {
  std::vector<T> a(kSteps * kA), b(kSteps * kB);
  std::vector<float> wide_a, wide_b, y(kRows * kColumns, std::numeric_limits<float>::quiet_NaN()), expected(y.size());
  for (std::size_t i = 0; i < a.size(); ++i) wide_a.push_back(to_float(a[i] = from_float<T>(std::sin(float(i)))));
  for (std::size_t i = 0; i < b.size(); ++i) wide_b.push_back(to_float(b[i] = from_float<T>(std::cos(float(3 * i)))));
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      double sum = 0;
      for (int step = 0; step < kSteps; ++step) {
        for (int k = 0; k < kDepth; ++k) {
          sum += double(wide_a[step * kA + row * kDepth + k]) * wide_b[step * kB + column * kDepth + k];
        }
      }
      expected[row * kColumns + column] = float(sum);
    }
  }
  const Error error =
      launch(product<T, kFault>, dim3(1), kThreads, shared_bytes<kFault>, nullptr, a.data(), b.data(), y.data());
  if (error != nullptr) return error;
  for (int first = 0; first < kThreads; first += 32) {  // a warp's signs belong together
    float signs = 0;
    for (int i = 0; i < 32; ++i) signs += expected[first + i] < 0 ? -1 : 1;
    for (int i = 0; i < 32; ++i) {
      const float want = expected[first + i] * signs;
      if (!(std::fabs(y[first + i] - want) <= 1e-4f * (1 + std::fabs(want)))) return "wrong";
    }
  }
  return "right";
}

template <Fault kFault>
void report(const char* name) {
  std::printf("%s float16: %s\n", name, run<__half, kFault>().c_str());
  std::printf("%s bfloat16: %s\n", name, run<__nv_bfloat16, kFault>().c_str());
  std::fflush(stdout);
}

__global__ void fill(float* y, int value) { y[blockIdx.x * blockDim.x + threadIdx.x] = float(value + int(blockIdx.x)); }

void report_launches() {
  std::vector<float> y(300 * 32);
  Error error = launch(fill, dim3(300), 32, 0, nullptr, y.data(), 7);
  bool right = error == nullptr;
  for (std::size_t i = 0; i < y.size(); ++i) right &= y[i] == 7.0f + float(i / 32);
  std::printf("many blocks: %s\n", right ? "right" : "wrong");
  error = launch(fill, dim3(1), 2048, 0, nullptr, y.data(), 7);
  std::printf("too many threads: %s\n", error ? error : "right");
  error = launch(fill, dim3(1), 32, 300 * 1024, nullptr, y.data(), 7);
  std::printf("too much shared memory: %s\n", error ? error : "right");
  error = launch(fill, dim3(1, 70000), 32, 0, nullptr, y.data(), 7);
  std::printf("too large a grid: %s\n", error ? error : "right");
  error = launch(fill, dim3(0), 32, 0, nullptr, y.data(), 7);
  std::printf("no block: %s\n", error ? error : "right");
}

// A conversion is right where it undoes the other one and picks the nearest number.
void report_conversions() {
  bool right = true;
  for (int bits = 0; bits < 1 << 16; ++bits) {
    __half h;
    __nv_bfloat16 b;
    const std::uint16_t narrow = std::uint16_t(bits);
    std::memcpy(&h, &narrow, 2);
    std::memcpy(&b, &narrow, 2);
    const float wide_h = to_float(h), wide_b = to_float(b);
    std::uint16_t back;
    if (!std::isnan(wide_h)) {
      const __half again = __float2half_rn(wide_h);
      std::memcpy(&back, &again, 2);
      right &= back == narrow;
      const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
      const double exact = exponent == 31  ? std::numeric_limits<double>::infinity()
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
      right &= double(wide_h) == (bits & 0x8000 ? -exact : exact);
      if (exponent < 31 && !(exponent == 30 && mantissa == 1023)) {  // halfway to the next: to the even one
        const float next = to_float(__half{std::uint16_t(bits + 1)});
        const __half rounded = __float2half_rn((wide_h + next) / 2);
        std::memcpy(&back, &rounded, 2);
        right &= back == (bits & 1 ? bits + 1 : bits);
      }
    }
    if (!std::isnan(wide_b)) {
      const __nv_bfloat16 again = __float2bfloat16_rn(wide_b);
      std::memcpy(&back, &again, 2);
      right &= back == narrow;
    }
  }
  right &= std::isnan(to_float(__float2half_rn(NAN))) && std::isnan(to_float(__float2bfloat16_rn(NAN)));
  right &= std::isinf(to_float(__float2half_rn(65520.0f))) && to_float(__float2half_rn(65519.0f)) == 65504.0f;
  std::printf("conversions: %s\n", right ? "right" : "wrong");
}

}  // namespace

int main(int count, char** names) {
  if (count > 1 && std::strcmp(names[1], "outside_global") == 0) {
    report<Fault::outside_global>("outside_global");
    return 0;
  }
  report<Fault::none>("none");
  report<Fault::missing_barrier>("missing_barrier");
  report<Fault::missing_second_barrier>("missing_second_barrier");
  report<Fault::missing_wait>("missing_wait");
  report<Fault::missing_lane_sync>("missing_lane_sync");
  report<Fault::outside_shared_matrix>("outside_shared_matrix");
  report<Fault::misaligned_copy>("misaligned_copy");
  report<Fault::unwritten_output>("unwritten_output");
  report<Fault::divergent_barrier>("divergent_barrier");
  report<Fault::divergent_lanes>("divergent_lanes");
  report<Fault::forgotten_copies>("forgotten_copies");
  report_launches();
  report_conversions();
  if (count > 1 && std::strcmp(names[1], "sanitized") == 0) return 0;
  report<Fault::outside_shared>("outside_shared");  // under AddressSanitizer it would be the last
}
