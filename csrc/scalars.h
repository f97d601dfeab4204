// From what Python gives to what the kernels share.
#pragma once

#include "update_rule.h"

namespace bdu {

inline PullScalars pull_scalars(double lr, double weight_decay, double sign, double clip,
                                double grad_scale, double ewc_lambda, double fisher_decay,
                                const Rounding& rounding) {
  PullScalars s;
  s.grad_factor = static_cast<float>(sign * clip / grad_scale);
  s.inverse_scale = static_cast<float>(1.0 / grad_scale);
  s.ewc_lambda = static_cast<float>(ewc_lambda);
  s.lr_lambda = static_cast<float>(lr * ewc_lambda);
  s.fisher_decay = static_cast<float>(fisher_decay);
  s.weight_decay = static_cast<float>(weight_decay);
  s.lr = static_cast<float>(lr);
  s.rounding = rounding;
  return s;
}

} // namespace bdu
