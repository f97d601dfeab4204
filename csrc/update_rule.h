// The update rule, element by element: the one place where its arithmetic is written down for the
// CPU and for CUDA. Symbols as in bdu/reference.py, which is the contract.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define BDU_HD __host__ __device__ __forceinline__
#else
#define BDU_HD inline __attribute__((always_inline))
#endif

namespace bdu {

enum class Pull : int { none = 0, gradient = 1, proximal = 2 };

// How parameters in bfloat16 are rounded: to nearest even, or stochastically with random bits that
// depend on nothing but the seed, the step and the element, so that all backends draw the same.
struct Rounding {
  bool is_stochastic;
  std::int64_t seed, step;
};

// What every element of one launch shares. Scalars that the optimizers combine are combined in
// double on the host, once, and rounded to float here.
struct PullScalars {
  float grad_factor;   // sign * clip / scale: turns the raw gradient into g
  float inverse_scale; // 1 / scale: the unclipped gradient of the running Fisher
  float ewc_lambda;    // lambda
  float lr_lambda;     // lr * lambda
  float fisher_decay;  // rho of the running Fisher
  float weight_decay;
  float lr;
  Rounding rounding;
};

struct SgdScalars {
  PullScalars pull;
  float momentum;
  float one_minus_dampening;
};

struct AdamwScalars {
  PullScalars pull;
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float epsilon;
  // Bias corrections belong to a tensor (its own step count), not to the launch.
  float step_size;                     // lr / (1 - beta1^t)
  float inverse_sqrt_bias_correction2; // 1 / sqrt(1 - beta2^t)
};

BDU_HD float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c; // without the instruction, fmaf() is a library call per element
#endif
}

// g, with the explicit pull of mode "gradient". The pull is never ascended, clipped or unscaled.
template <Pull pull>
BDU_HD float pulled_gradient(float grad, float drift, float fisher, const PullScalars& s) {
  float g = grad * s.grad_factor;
  if (pull == Pull::gradient) g = fused_multiply_add(s.ewc_lambda * fisher, drift, g);
  return g;
}

// theta* + (theta' - theta*) / (1 + lr lambda F), written so that F = 0 leaves theta' untouched,
// an overflowing product still lands on the anchor, and a NaN stays one.
BDU_HD float proximal_pull(float param, float fisher, float anchor, const PullScalars& s) {
  float c = s.lr_lambda * fisher;
  c = c > 1e30f ? 1e30f : c;
  return fused_multiply_add(-(c / (1.0f + c)), param - anchor, param);
}

BDU_HD float running_fisher(float fisher, float grad, const PullScalars& s) {
  const float g = grad * s.inverse_scale;
  return fused_multiply_add(1.0f - s.fisher_decay, g * g, s.fisher_decay * fisher);
}

template <Pull pull, bool has_momentum, bool nesterov>
BDU_HD float sgd_update(float param, float g, float& momentum_buffer, const SgdScalars& s) {
  g = fused_multiply_add(s.pull.weight_decay, param, g);
  if (has_momentum) {
    momentum_buffer = fused_multiply_add(s.momentum, momentum_buffer, s.one_minus_dampening * g);
    g = nesterov ? fused_multiply_add(s.momentum, momentum_buffer, g) : momentum_buffer;
  }
  return fused_multiply_add(-s.pull.lr, g, param);
}

BDU_HD float adamw_update(float param, float g, float& exp_avg, float& exp_avg_sq,
                          const AdamwScalars& s) {
  exp_avg = fused_multiply_add(s.one_minus_beta1, g - exp_avg, exp_avg);
  exp_avg_sq = fused_multiply_add(s.one_minus_beta2 * g, g, s.beta2 * exp_avg_sq);
  const float denominator =
      fused_multiply_add(__builtin_sqrtf(exp_avg_sq), s.inverse_sqrt_bias_correction2, s.epsilon);
  param = fused_multiply_add(-s.pull.lr * s.pull.weight_decay, param, param);
  return fused_multiply_add(-s.step_size, exp_avg / denominator, param);
}

} // namespace bdu
