// What a launch is told: columns of raw addresses, one row per tensor. No Python, no torch.
#pragma once

#include <cstdint>

#include "update_rule.h"

namespace bdu {

enum class Dtype : std::uint8_t { float32 = 0, bfloat16 = 1, float16 = 2 };

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
  Column param, grad, momentum_buffer, fisher, anchor;
};

struct AdamwTable {
  std::int64_t tensors;
  const std::int64_t* numel;
  Column param, grad, exp_avg, exp_avg_sq, fisher, anchor;
  const float* step; // t of each tensor, already incremented for this step
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
