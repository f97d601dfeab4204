// The CPU kernels, written once and compiled per instruction set (BDU_ISA). A chunk is walked in
// tiles that stay in the first-level cache: half-precision columns are converted into a tile of
// floats and back, float columns are used where they lie, so one loop serves every mix of dtypes.
#include "chunk_kernels.h"

#include <algorithm>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define BDU_CONCATENATE_(a, b) a##b
#define BDU_CONCATENATE(a, b) BDU_CONCATENATE_(a, b)
#define BDU_STRING_(a) #a
#define BDU_STRING(a) BDU_STRING_(a)

namespace bdu::cpu {
namespace {

constexpr int kTile = 512;
constexpr int kLanes = 16; // partial sums; fixed, so that every instruction set adds alike

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void from_bfloat16(const std::uint16_t* in, float* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = float_of(std::uint32_t{in[i]} << 16);
}

// Round to nearest even. A NaN keeps its sign and becomes quiet: truncating its payload could
// leave an infinity behind.
void to_bfloat16(const float* in, std::uint16_t* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const std::uint32_t bits = bits_of(in[i]);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (bits >> 16) | 0x40u;
    out[i] = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
}

float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000u} << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude + 0x1c000u) << 13));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
}

std::uint16_t float_to_half(float value) {
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
}

void from_float16(const std::uint16_t* in, float* out, int n) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; ++i) out[i] = half_to_float(in[i]);
}

void to_float16(const float* in, std::uint16_t* out, int n) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) out[i] = float_to_half(in[i]);
}

// A column seen as floats, one tile at a time.
class Tile {
 public:
  explicit Tile(const View& view) : view_(view) {}

  float* load(std::int64_t offset, int n) {
    if (view_.data == nullptr) return buffer_; // never read: the switches say so
    if (view_.dtype == Dtype::float32) return static_cast<float*>(view_.data) + offset;
    const auto* in = static_cast<const std::uint16_t*>(view_.data) + offset;
    view_.dtype == Dtype::bfloat16 ? from_bfloat16(in, buffer_, n) : from_float16(in, buffer_, n);
    return buffer_;
  }

  void store(std::int64_t offset, int n) {
    if (view_.data == nullptr || view_.dtype == Dtype::float32) return;
    auto* out = static_cast<std::uint16_t*>(view_.data) + offset;
    view_.dtype == Dtype::bfloat16 ? to_bfloat16(buffer_, out, n) : to_float16(buffer_, out, n);
  }

 private:
  View view_;
  alignas(64) float buffer_[kTile];
};

double lane_sum(const float* value, int n) {
  float lane[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lane[l] += value[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lane[l] += value[i];
  double sum = 0.0;
  for (float partial : lane) sum += partial;
  return sum;
}

template <Pull pull, bool has_momentum, bool nesterov, bool update_fisher>
double ewc_sgd_chunk(const SgdChunk& chunk, const SgdScalars& scalars) {
  Tile param(chunk.param), grad(chunk.grad), momentum_buffer(chunk.momentum_buffer),
      fisher(chunk.fisher), anchor(chunk.anchor);
  alignas(64) float contribution[kTile];
  const SgdScalars s = scalars;
  double penalty = 0.0;
  for (std::int64_t offset = 0; offset < chunk.n; offset += kTile) {
    const int n = static_cast<int>(std::min<std::int64_t>(kTile, chunk.n - offset));
    float* __restrict p = param.load(offset, n);
    const float* __restrict g = grad.load(offset, n);
    float* __restrict m = has_momentum ? momentum_buffer.load(offset, n) : nullptr;
    float* __restrict f = pull != Pull::none || update_fisher ? fisher.load(offset, n) : nullptr;
    const float* __restrict a = pull != Pull::none ? anchor.load(offset, n) : nullptr;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const float drift = pull != Pull::none ? p[i] - a[i] : 0.0f;
      const float curvature = pull != Pull::none ? f[i] : 0.0f;
      if (pull != Pull::none) contribution[i] = curvature * drift * drift;
      float momentum = has_momentum ? m[i] : 0.0f;
      const float direction = pulled_gradient<pull>(g[i], drift, curvature, s.pull);
      float next = sgd_update<pull, has_momentum, nesterov>(p[i], direction, momentum, s);
      if (pull == Pull::proximal) next = proximal_pull(next, curvature, a[i], s.pull);
      if (update_fisher) f[i] = running_fisher(f[i], g[i], s.pull);
      if (has_momentum) m[i] = momentum;
      p[i] = next;
    }
    if (pull != Pull::none) penalty += lane_sum(contribution, n);
    param.store(offset, n);
    if (has_momentum) momentum_buffer.store(offset, n);
    if (update_fisher) fisher.store(offset, n);
  }
  return penalty;
}

template <Pull pull, bool update_fisher>
double ewc_adamw_chunk(const AdamwChunk& chunk, const AdamwScalars& scalars) {
  Tile param(chunk.param), grad(chunk.grad), exp_avg(chunk.exp_avg), exp_avg_sq(chunk.exp_avg_sq),
      fisher(chunk.fisher), anchor(chunk.anchor);
  alignas(64) float contribution[kTile];
  const AdamwScalars s = scalars;
  double penalty = 0.0;
  for (std::int64_t offset = 0; offset < chunk.n; offset += kTile) {
    const int n = static_cast<int>(std::min<std::int64_t>(kTile, chunk.n - offset));
    float* __restrict p = param.load(offset, n);
    const float* __restrict g = grad.load(offset, n);
    float* __restrict m = exp_avg.load(offset, n);
    float* __restrict v = exp_avg_sq.load(offset, n);
    float* __restrict f = pull != Pull::none || update_fisher ? fisher.load(offset, n) : nullptr;
    const float* __restrict a = pull != Pull::none ? anchor.load(offset, n) : nullptr;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const float drift = pull != Pull::none ? p[i] - a[i] : 0.0f;
      const float curvature = pull != Pull::none ? f[i] : 0.0f;
      if (pull != Pull::none) contribution[i] = curvature * drift * drift;
      const float direction = pulled_gradient<pull>(g[i], drift, curvature, s.pull);
      float first = m[i], second = v[i];
      float next = adamw_update(p[i], direction, first, second, s);
      if (pull == Pull::proximal) next = proximal_pull(next, curvature, a[i], s.pull);
      if (update_fisher) f[i] = running_fisher(f[i], g[i], s.pull);
      m[i] = first;
      v[i] = second;
      p[i] = next;
    }
    if (pull != Pull::none) penalty += lane_sum(contribution, n);
    param.store(offset, n);
    exp_avg.store(offset, n);
    exp_avg_sq.store(offset, n);
    if (update_fisher) fisher.store(offset, n);
  }
  return penalty;
}

template <Pull pull, bool update_fisher>
double ewc_sgd_with_momentum(const SgdChunk& chunk, const SgdScalars& s, const Switches& on) {
  if (!on.has_momentum) return ewc_sgd_chunk<pull, false, false, update_fisher>(chunk, s);
  if (!on.nesterov) return ewc_sgd_chunk<pull, true, false, update_fisher>(chunk, s);
  return ewc_sgd_chunk<pull, true, true, update_fisher>(chunk, s);
}

template <Pull pull>
double ewc_sgd_with_pull(const SgdChunk& chunk, const SgdScalars& s, const Switches& on) {
  return on.update_fisher ? ewc_sgd_with_momentum<pull, true>(chunk, s, on)
                          : ewc_sgd_with_momentum<pull, false>(chunk, s, on);
}

template <Pull pull>
double ewc_adamw_with_pull(const AdamwChunk& chunk, const AdamwScalars& s, const Switches& on) {
  return on.update_fisher ? ewc_adamw_chunk<pull, true>(chunk, s)
                          : ewc_adamw_chunk<pull, false>(chunk, s);
}

double ewc_sgd(const SgdChunk& chunk, const SgdScalars& s, const Switches& on) {
  switch (on.pull) {
    case Pull::gradient: return ewc_sgd_with_pull<Pull::gradient>(chunk, s, on);
    case Pull::proximal: return ewc_sgd_with_pull<Pull::proximal>(chunk, s, on);
    default: return ewc_sgd_with_pull<Pull::none>(chunk, s, on);
  }
}

double ewc_adamw(const AdamwChunk& chunk, const AdamwScalars& s, const Switches& on) {
  switch (on.pull) {
    case Pull::gradient: return ewc_adamw_with_pull<Pull::gradient>(chunk, s, on);
    case Pull::proximal: return ewc_adamw_with_pull<Pull::proximal>(chunk, s, on);
    default: return ewc_adamw_with_pull<Pull::none>(chunk, s, on);
  }
}

// Squares in double: a float would overflow from |g| = 1.8e19 on and lose what is below 1e-23.
double square_sum(const View& view, std::int64_t numel) {
  Tile tile(view);
  double sum = 0.0;
  for (std::int64_t offset = 0; offset < numel; offset += kTile) {
    const int n = static_cast<int>(std::min<std::int64_t>(kTile, numel - offset));
    const float* __restrict value = tile.load(offset, n);
    double lane[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const double wide = value[i + l];
        lane[l] += wide * wide;
      }
    }
    for (int l = 0; i < n; ++i, ++l) lane[l] += double{value[i]} * double{value[i]};
    for (double partial : lane) sum += partial;
  }
  return sum;
}

void stream(const Streams& streams, std::int64_t offset, std::int64_t n) {
  const std::uint32_t* __restrict a = streams.read[0] + offset;
  const std::uint32_t* __restrict b = streams.read[1] + offset;
  const std::uint32_t* __restrict c = streams.read[2] + offset;
  std::uint32_t* __restrict x = streams.written[0] + offset;
  std::uint32_t* __restrict y = streams.written[1] + offset;
  if (streams.written[2] == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint32_t word = a[i] ^ b[i] ^ c[i];
      x[i] ^= word;
      y[i] ^= word;
    }
    return;
  }
  std::uint32_t* __restrict z = streams.written[2] + offset;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t word = a[i] ^ b[i] ^ c[i];
    x[i] ^= word;
    y[i] ^= word;
    z[i] ^= word;
  }
}

} // namespace

const ChunkKernels& BDU_CONCATENATE(chunk_kernels_, BDU_ISA)() {
  static const ChunkKernels kernels{BDU_STRING(BDU_ISA), ewc_sgd, ewc_adamw, square_sum, stream};
  return kernels;
}

} // namespace bdu::cpu
