// float16, by its bits.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  std::uint16_t bits;
};

struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const std::uint32_t sign = std::uint32_t(h.bits & 0x8000u) << 16, rest = std::uint32_t(h.bits & 0x7fffu) << 13;
  float scaled, value;
  std::memcpy(&scaled, &rest, 4);
  scaled *= 0x1p112f;  // the exponent's bias, subnormal numbers included
  std::uint32_t bits;
  std::memcpy(&bits, &scaled, 4);
  bits = sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : bits);
  std::memcpy(&value, &bits, 4);
  return value;
}

// To the nearest, ties to even.
inline __half __float2half_rn(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const std::uint16_t sign = std::uint16_t(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {std::uint16_t(sign | 0x7fffu)};
  if (bits >= 0x477ff000u) return {std::uint16_t(sign | 0x7c00u)};
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 rounds at the place that float16 has there
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {std::uint16_t(sign | (bits - 0x3f000000u))};
  }
  bits += 0xc8000fffu + (bits >> 13 & 1u);
  return {std::uint16_t(sign | bits >> 13)};
}

inline __half __float2half(float f) { return __float2half_rn(f); }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }
