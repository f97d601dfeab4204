// From what Python gives to what the kernels share.
#pragma once

#include <algorithm>

#include "update_rule.h"

namespace bdu {

constexpr double kLargest = 3.4e38; // of what fits into a float

inline PullScalars pull_scalars(double lr, double weight_decay, double sign, double clip,
                                double grad_scale, double ewc_lambda, double fisher_decay,
                                const Rounding& rounding) {
  PullScalars s;
  s.grad_factor = static_cast<float>(sign * clip / grad_scale);
  s.inverse_scale = static_cast<float>(1.0 / grad_scale);
  // An infinity would turn a Fisher of 0 into a NaN.
  s.ewc_lambda = static_cast<float>(std::min(ewc_lambda, kLargest));
  s.lr_lambda = static_cast<float>(std::min(lr * ewc_lambda, kLargest));
  s.fisher_decay = static_cast<float>(fisher_decay);
  s.weight_decay = static_cast<float>(weight_decay);
  s.lr = static_cast<float>(lr);
  s.rounding = rounding;
  return s;
}

} // namespace bdu
