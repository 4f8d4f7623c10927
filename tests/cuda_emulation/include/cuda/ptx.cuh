// The functions of csrc/cuda/ptx.cuh on the CPU: found first on the include path, in its place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace crossvit::ptx {

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

inline void copy_async(void* shared, const void* global, int bytes = 16) {
  emulation::copy_async(shared, global, bytes, 16);
}
inline void copy_async_8(void* shared, const void* global, int bytes = 8) {
  emulation::copy_async(shared, global, bytes, 8);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_copies() {
  emulation::wait_copies(kPending);
}

namespace detail {

struct Matrices {
  std::uint32_t* r;
  const void* row;
};

template <int kCount, bool kTransposed>
void load(void* const (&lanes)[32]) {
  for (int m = 0; m < kCount; ++m) {
    std::uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) {
      const void* row = static_cast<Matrices*>(lanes[8 * m + i])->row;
      std::memcpy(matrix[i], row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      const std::uint32_t low = kTransposed ? matrix[pair][group] : matrix[group][pair];
      const std::uint32_t high = kTransposed ? matrix[pair + 1][group] : matrix[group][pair + 1];
      static_cast<Matrices*>(lanes[lane])->r[m] = low | high << 16;
    }
  }
}

template <int kCount, bool kTransposed>
void load_matrices(std::uint32_t (&r)[kCount], const void* row) {
  if (emulation::lane < 8 * kCount) emulation::check_shared("ldmatrix", row, 16, 16);
  Matrices mine{r, row};
  emulation::collective(kTransposed ? "ldmatrix.trans" : "ldmatrix", &mine, load<kCount, kTransposed>);
}

struct Operands {
  float* d;
  const std::uint32_t *a, *b;
};

inline float decode(__half, std::uint32_t bits) { return __half2float({std::uint16_t(bits)}); }
inline float decode(__nv_bfloat16, std::uint32_t bits) { return __bfloat162float({std::uint16_t(bits)}); }
inline float tf32(std::uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }  // the rest is not looked at

// A row of b or d; on x86-64 two or one vector registers.
using Row = float __attribute__((vector_size(32)));

// d += a b, d (16, 8) in the lanes' registers; the products of 16-bit and TF32 numbers are exact in float32.
template <int kK>
void accumulate(void* const (&lanes)[32], const float (&a)[16][kK], const Row (&b)[kK]) {
  for (int group = 0; group < 8; ++group) {
    Row low{}, high{};
    for (int k = 0; k < kK; ++k) {
      low += a[group][k] * b[k];
      high += a[group + 8][k] * b[k];
    }
    for (int pair = 0; pair < 4; ++pair) {
      float* d = static_cast<Operands*>(lanes[4 * group + pair])->d;
      d[0] += low[2 * pair];
      d[1] += low[2 * pair + 1];
      d[2] += high[2 * pair];
      d[3] += high[2 * pair + 1];
    }
  }
}

template <class T>
void multiply_m16n8k16(void* const (&lanes)[32]) {
  float a[16][16];
  Row b[16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& of = *static_cast<Operands*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
      a[row][column] = decode(T(), of.a[i]);
      a[row][column + 1] = decode(T(), of.a[i] >> 16);
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + 8 * i][group] = decode(T(), of.b[i]);
      b[pair + 8 * i + 1][group] = decode(T(), of.b[i] >> 16);
    }
  }
  accumulate<16>(lanes, a, b);
}

inline void multiply_m16n8k8(void* const (&lanes)[32]) {
  float a[16][8];
  Row b[8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& of = *static_cast<Operands*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][pair + i / 2 * 4] = tf32(of.a[i]);
    for (int i = 0; i < 2; ++i) b[pair + 4 * i][group] = tf32(of.b[i]);
  }
  accumulate<8>(lanes, a, b);
}

}  // namespace detail

inline void load_matrices(std::uint32_t (&r)[4], const void* row) { detail::load_matrices<4, false>(r, row); }
inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) { detail::load_matrices<4, true>(r, row); }
inline void load_matrices(std::uint32_t (&r)[2], const void* row) { detail::load_matrices<2, false>(r, row); }
inline void load_matrices_transposed(std::uint32_t (&r)[2], const void* row) { detail::load_matrices<2, true>(r, row); }

template <class T>
void multiply(T, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  detail::Operands mine{d, a, b};
  emulation::collective("mma.m16n8k16", &mine, detail::multiply_m16n8k16<T>);
}

inline void multiply_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  detail::Operands mine{d, a, b};
  emulation::collective("mma.m16n8k8", &mine, detail::multiply_m16n8k8);
}

inline std::uint32_t round_to_tf32(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace crossvit::ptx
