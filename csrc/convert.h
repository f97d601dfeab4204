// What is stored in fewer bits, from float and to it, the same on the CPU and in CUDA. Half
// precision is rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "table.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace bdu {

BDU_HD std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

BDU_HD float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

BDU_HD float from_bfloat16(std::uint16_t value) { return float_of(std::uint32_t{value} << 16); }

// A NaN stays one: truncating its payload could leave an infinity behind.
BDU_HD std::uint16_t to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<std::uint16_t>((value != value ? bits | 0x400000u : rounded) >> 16);
#endif
}

BDU_HD float from_float16(std::uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#else
  const std::uint32_t sign = std::uint32_t{half & 0x8000u} << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude + 0x1c000u) << 13));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
#endif
}

BDU_HD std::uint16_t to_float16(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const std::uint32_t bits = bits_of(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) // NaN
    return static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu));
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u); // rounds to inf
  if (magnitude < 0x38800000u) { // subnormal: let the addition's rounding do the work
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
  }
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
#endif
}

// lowbias32 (Ellis, "hash-prospector"), a bijection of 32 bits.
BDU_HD std::uint32_t mixed_bits(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// 16 bits for one element; neighbours share a draw. bdu/rounding.py computes the same.
BDU_HD std::uint32_t random_bits(const Rounding& rounding, std::int64_t element) {
  const auto pair = static_cast<std::uint64_t>(element) >> 1;
  const auto seed = static_cast<std::uint64_t>(rounding.seed);
  const auto step = static_cast<std::uint64_t>(rounding.step);
  std::uint32_t x = static_cast<std::uint32_t>(seed) ^
                    mixed_bits(static_cast<std::uint32_t>(seed >> 32) + 0x9e3779b9u);
  x = mixed_bits(mixed_bits(x) ^ static_cast<std::uint32_t>(step));
  x = mixed_bits(x + static_cast<std::uint32_t>(pair >> 32));
  x = mixed_bits(x ^ static_cast<std::uint32_t>(pair));
  return (element & 1) != 0 ? x >> 16 : x & 0xffffu;
}

// Up with the probability of what truncation would lose; infinities and NaN as to_bfloat16.
BDU_HD std::uint16_t to_bfloat16_stochastic(float value, std::uint32_t random) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return to_bfloat16(value);
  return static_cast<std::uint16_t>((bits + random) >> 16);
}

// An entry of a Fisher in 8 bits; the scale comes from scale_of_8_bits and is the same for a block.
BDU_HD float from_8_bits(Dtype dtype, std::uint8_t code, float scale) {
  if (dtype == Dtype::square_root_8) {
    const float q = static_cast<float>(code);
    return q * q * scale;
  }
  const float q = static_cast<float>(static_cast<std::int8_t>(code)) + 128.0f;
  return q == 0.0f ? 0.0f : scale * exp2f((q - 255.0f) * (24.0f / 254.0f));
}

BDU_HD float scale_of_8_bits(Dtype dtype, std::uint16_t bfloat16) {
  const float scale = from_bfloat16(bfloat16);
  return dtype == Dtype::square_root_8 ? scale * (1.0f / 65025.0f) : scale;
}

} // namespace bdu
