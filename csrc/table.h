// What a launch is told: columns of raw addresses, one row per tensor. No Python, no torch.
#pragma once

#include <cstdint>

#include "update_rule.h"

namespace bdu {

// The last two are a Fisher's maps of 8 bits, bdu/quantization.py, and have a scale for each block.
enum class Dtype : std::uint8_t {
  float32 = 0,
  bfloat16 = 1,
  float16 = 2,
  square_root_8 = 3,
  logarithmic_8 = 4
};

constexpr int kScaleBlock = 32;

BDU_HD int bytes_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : dtype == Dtype::bfloat16 || dtype == Dtype::float16 ? 2 : 1;
}

// How the columns of a row or launch are stored: all alike, known to the compiler, or not.
enum class Stored : int { float32 = 0, bfloat16 = 1, float16 = 2, mixed = 3 };

// One column: n addresses (0 = this tensor has none) and the dtype behind each.
struct Column {
  const std::int64_t* address;
  const std::uint8_t* dtype;
};

struct SgdTable {
  std::int64_t tensors;
  const std::int64_t* numel;
  Column param, grad, momentum_buffer, fisher, anchor, fisher_scale;
  const std::int64_t* first_element; // of each tensor, counted over all of the optimizer's
};

struct AdamwTable {
  std::int64_t tensors;
  const std::int64_t* numel;
  Column param, grad, exp_avg, exp_avg_sq, fisher, anchor, fisher_scale;
  const std::int64_t* first_element; // of each tensor, counted over all of the optimizer's
  const float* step;                 // t of each tensor, already incremented for this step
};

struct Switches {
  Pull pull;
  bool has_momentum;
  bool nesterov;
  bool update_fisher;
};

struct AdamwSettings {
  double lr, beta1, beta2, epsilon;
};

} // namespace bdu
