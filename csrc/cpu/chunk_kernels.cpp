// The CPU kernels, written once and compiled per instruction set (BDU_ISA). A chunk is walked in
// blocks of a few registers, so that arithmetic and conversion hide behind the memory's latency:
// worked through in larger pieces they would add to it. Columns of one dtype are converted in the
// loop itself; a mix of dtypes goes through a block of floats, so one loop serves all of them.
#include "chunk_kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../convert.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define BDU_CONCATENATE_(a, b) a##b
#define BDU_CONCATENATE(a, b) BDU_CONCATENATE_(a, b)
#define BDU_STRING_(a) #a
#define BDU_STRING(a) BDU_STRING_(a)

namespace bdu::cpu {
namespace {

constexpr int kBlock = 32;   // elements at a time; one cache line of a half-precision column
constexpr int kTile = 512;   // elements whose penalty is added in float
constexpr int kLanes = 16;   // partial sums; fixed, so that every instruction set adds alike
constexpr int kAhead = 1024; // bytes; hardware prefetch alone loses a fifth with five streams

void from_float16s(const std::uint16_t* in, float* out, int n) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; ++i) out[i] = from_float16(in[i]);
}

void to_float16s(const float* in, std::uint16_t* out, int n) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) out[i] = to_float16(in[i]);
}

// Stochastic rounding has no kernel of its own for bfloat16: the mixed one does it.
Stored stored_as(std::initializer_list<View> columns, const Rounding& rounding) {
  if (rounding.is_stochastic) return Stored::mixed;
  bool all_float32 = true, all_bfloat16 = true;
  for (const View& view : columns) {
    if (view.data == nullptr) continue;
    all_float32 = all_float32 && view.dtype == Dtype::float32;
    all_bfloat16 = all_bfloat16 && view.dtype == Dtype::bfloat16;
  }
  return all_float32 ? Stored::float32 : all_bfloat16 ? Stored::bfloat16 : Stored::mixed;
}

// A column seen as floats, one block at a time: load(), then get() and set(), then store().
template <Stored stored>
class Block {
  using Element = std::conditional_t<stored == Stored::float32, float, std::uint16_t>;

 public:
  explicit Block(const View& view) : data_(static_cast<Element*>(view.data)) {}

  void load(std::int64_t offset, int) {
    at_ = data_ + offset;
    const char* ahead = reinterpret_cast<const char*>(at_) + kAhead;
    for (std::size_t byte = 0; byte < kBlock * sizeof(Element); byte += 64)
      __builtin_prefetch(ahead + byte);
  }
  float get(int i) const {
    if constexpr (stored == Stored::float32)
      return at_[i];
    else
      return from_bfloat16(at_[i]);
  }
  void set(int i, float value) {
    if constexpr (stored == Stored::float32)
      at_[i] = value;
    else
      at_[i] = to_bfloat16(value);
  }
  void store(std::int64_t, int) {}
  void store_param(const Rounding&, std::int64_t, std::int64_t, int) {}

 private:
  Element *data_, *at_ = nullptr;
};

template <>
class Block<Stored::mixed> {
 public:
  explicit Block(const View& view) : view_(view) {}

  void load(std::int64_t offset, int n) {
    if (view_.data == nullptr) return; // never read: the switches say so
    if (view_.dtype == Dtype::float32) {
      std::memcpy(value_, static_cast<const float*>(view_.data) + offset, n * sizeof(float));
      return;
    }
    if (bytes_of(view_.dtype) == 1) return load_8_bits(offset, n);
    const auto* in = static_cast<const std::uint16_t*>(view_.data) + offset;
    if (view_.dtype == Dtype::float16) return from_float16s(in, value_, n);
#pragma omp simd
    for (int i = 0; i < n; ++i) value_[i] = from_bfloat16(in[i]);
  }
  float get(int i) const { return value_[i]; }
  void set(int i, float value) { value_[i] = value; }
  void store(std::int64_t offset, int n) {
    if (view_.data == nullptr) return;
    if (view_.dtype == Dtype::float32) {
      std::memcpy(static_cast<float*>(view_.data) + offset, value_, n * sizeof(float));
      return;
    }
    auto* out = static_cast<std::uint16_t*>(view_.data) + offset;
    if (view_.dtype == Dtype::float16) return to_float16s(value_, out, n);
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = to_bfloat16(value_[i]);
  }

  // As a parameter, which may be rounded stochastically.
  void store_param(const Rounding& rounding, std::int64_t element, std::int64_t offset, int n) {
    if (!rounding.is_stochastic || view_.dtype != Dtype::bfloat16) return store(offset, n);
    auto* out = static_cast<std::uint16_t*>(view_.data) + offset;
#pragma omp simd
    for (int i = 0; i < n; ++i)
      out[i] = to_bfloat16_stochastic(value_[i], random_bits(rounding, element + i));
  }

 private:
  void load_8_bits(std::int64_t offset, int n) {
    static_assert(kBlock == kScaleBlock, "a block has one scale");
    const auto* in = static_cast<const std::uint8_t*>(view_.data) + offset;
    const float scale = scale_of_8_bits(view_.dtype, view_.scale[offset / kScaleBlock]);
    if (view_.dtype == Dtype::square_root_8) {
#pragma omp simd
      for (int i = 0; i < n; ++i) value_[i] = from_8_bits(Dtype::square_root_8, in[i], scale);
    } else {
      for (int i = 0; i < n; ++i) value_[i] = from_8_bits(Dtype::logarithmic_8, in[i], scale);
    }
  }

  View view_;
  alignas(64) float value_[kBlock];
};

// Adds what is given in a fixed order: in float within a tile and a lane, in double beyond.
class LaneSum {
 public:
  void add(const float* value, int n) {
    for (int first = 0; first < n; first += kLanes) {
      const int count = std::min(kLanes, n - first);
#pragma omp simd
      for (int l = 0; l < count; ++l) lane_[l] += value[first + l];
    }
    if ((taken_ += n) % kTile == 0) flush();
  }
  double total() {
    flush();
    return sum_;
  }

 private:
  void flush() {
    double tile = 0.0;
    for (float& partial : lane_) {
      tile += partial;
      partial = 0.0f;
    }
    sum_ += tile;
  }

  alignas(64) float lane_[kLanes] = {};
  double sum_ = 0.0;
  std::int64_t taken_ = 0;
};

// Calls block(offset, n) over [0, n); the compiler knows n for all blocks but the last.
template <class F>
BDU_HD void for_each_block(std::int64_t n, const F& block) {
  std::int64_t offset = 0;
  for (; offset + kBlock <= n; offset += kBlock)
    block(offset, std::integral_constant<int, kBlock>{});
  if (offset < n) block(offset, static_cast<int>(n - offset));
}

template <Stored stored, Pull pull, bool has_momentum, bool nesterov, bool update_fisher>
double ewc_sgd_chunk(const SgdChunk& chunk, const SgdScalars& scalars) {
  Block<stored> param(chunk.param), grad(chunk.grad), momentum_buffer(chunk.momentum_buffer),
      fisher(chunk.fisher), anchor(chunk.anchor);
  constexpr bool has_pull = pull != Pull::none;
  const SgdScalars s = scalars;
  LaneSum penalty;
  for_each_block(chunk.n, [&](std::int64_t offset, auto n) {
    alignas(64) float contribution[kBlock];
    param.load(offset, n);
    grad.load(offset, n);
    if (has_momentum) momentum_buffer.load(offset, n);
    if (has_pull || update_fisher) fisher.load(offset, n);
    if (has_pull) anchor.load(offset, n);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const float p = param.get(i), g = grad.get(i);
      const float a = has_pull ? anchor.get(i) : 0.0f;
      const float f = has_pull || update_fisher ? fisher.get(i) : 0.0f;
      const float drift = p - a;
      if (has_pull) contribution[i] = f * drift * drift;
      float momentum = has_momentum ? momentum_buffer.get(i) : 0.0f;
      const float direction = pulled_gradient<pull>(g, drift, f, s.pull);
      float next = sgd_update<pull, has_momentum, nesterov>(p, direction, momentum, s);
      if (pull == Pull::proximal) next = proximal_pull(next, f, a, s.pull);
      if (update_fisher) fisher.set(i, running_fisher(f, g, s.pull));
      if (has_momentum) momentum_buffer.set(i, momentum);
      param.set(i, next);
    }
    if (has_pull) penalty.add(contribution, n);
    param.store_param(s.pull.rounding, chunk.first_element + offset, offset, n);
    if (has_momentum) momentum_buffer.store(offset, n);
    if (update_fisher) fisher.store(offset, n);
  });
  return penalty.total();
}

template <Stored stored, Pull pull, bool update_fisher>
double ewc_adamw_chunk(const AdamwChunk& chunk, const AdamwScalars& scalars) {
  Block<stored> param(chunk.param), grad(chunk.grad), exp_avg(chunk.exp_avg),
      exp_avg_sq(chunk.exp_avg_sq), fisher(chunk.fisher), anchor(chunk.anchor);
  constexpr bool has_pull = pull != Pull::none;
  const AdamwScalars s = scalars;
  LaneSum penalty;
  for_each_block(chunk.n, [&](std::int64_t offset, auto n) {
    alignas(64) float contribution[kBlock];
    param.load(offset, n);
    grad.load(offset, n);
    exp_avg.load(offset, n);
    exp_avg_sq.load(offset, n);
    if (has_pull || update_fisher) fisher.load(offset, n);
    if (has_pull) anchor.load(offset, n);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const float p = param.get(i), g = grad.get(i);
      const float a = has_pull ? anchor.get(i) : 0.0f;
      const float f = has_pull || update_fisher ? fisher.get(i) : 0.0f;
      const float drift = p - a;
      if (has_pull) contribution[i] = f * drift * drift;
      float first = exp_avg.get(i), second = exp_avg_sq.get(i);
      const float direction = pulled_gradient<pull>(g, drift, f, s.pull);
      float next = adamw_update(p, direction, first, second, s);
      if (pull == Pull::proximal) next = proximal_pull(next, f, a, s.pull);
      if (update_fisher) fisher.set(i, running_fisher(f, g, s.pull));
      exp_avg.set(i, first);
      exp_avg_sq.set(i, second);
      param.set(i, next);
    }
    if (has_pull) penalty.add(contribution, n);
    param.store_param(s.pull.rounding, chunk.first_element + offset, offset, n);
    exp_avg.store(offset, n);
    exp_avg_sq.store(offset, n);
    if (update_fisher) fisher.store(offset, n);
  });
  return penalty.total();
}

template <Stored stored, Pull pull, bool update_fisher>
double ewc_sgd_with_momentum(const SgdChunk& chunk, const SgdScalars& s, const Switches& on) {
  if (!on.has_momentum) return ewc_sgd_chunk<stored, pull, false, false, update_fisher>(chunk, s);
  if (!on.nesterov) return ewc_sgd_chunk<stored, pull, true, false, update_fisher>(chunk, s);
  return ewc_sgd_chunk<stored, pull, true, true, update_fisher>(chunk, s);
}

template <Stored stored, Pull pull>
double ewc_sgd_with_pull(const SgdChunk& chunk, const SgdScalars& s, const Switches& on) {
  return on.update_fisher ? ewc_sgd_with_momentum<stored, pull, true>(chunk, s, on)
                          : ewc_sgd_with_momentum<stored, pull, false>(chunk, s, on);
}

template <Stored stored>
double ewc_sgd_stored(const SgdChunk& chunk, const SgdScalars& s, const Switches& on) {
  switch (on.pull) {
    case Pull::gradient: return ewc_sgd_with_pull<stored, Pull::gradient>(chunk, s, on);
    case Pull::proximal: return ewc_sgd_with_pull<stored, Pull::proximal>(chunk, s, on);
    default: return ewc_sgd_with_pull<stored, Pull::none>(chunk, s, on);
  }
}

template <Stored stored, Pull pull>
double ewc_adamw_with_pull(const AdamwChunk& chunk, const AdamwScalars& s, const Switches& on) {
  return on.update_fisher ? ewc_adamw_chunk<stored, pull, true>(chunk, s)
                          : ewc_adamw_chunk<stored, pull, false>(chunk, s);
}

template <Stored stored>
double ewc_adamw_stored(const AdamwChunk& chunk, const AdamwScalars& s, const Switches& on) {
  switch (on.pull) {
    case Pull::gradient: return ewc_adamw_with_pull<stored, Pull::gradient>(chunk, s, on);
    case Pull::proximal: return ewc_adamw_with_pull<stored, Pull::proximal>(chunk, s, on);
    default: return ewc_adamw_with_pull<stored, Pull::none>(chunk, s, on);
  }
}

double ewc_sgd(const SgdChunk& c, const SgdScalars& s, const Switches& on) {
  switch (stored_as({c.param, c.grad, c.momentum_buffer, c.fisher, c.anchor}, s.pull.rounding)) {
    case Stored::float32: return ewc_sgd_stored<Stored::float32>(c, s, on);
    case Stored::bfloat16: return ewc_sgd_stored<Stored::bfloat16>(c, s, on);
    default: return ewc_sgd_stored<Stored::mixed>(c, s, on);
  }
}

double ewc_adamw(const AdamwChunk& c, const AdamwScalars& s, const Switches& on) {
  switch (
      stored_as({c.param, c.grad, c.exp_avg, c.exp_avg_sq, c.fisher, c.anchor}, s.pull.rounding)) {
    case Stored::float32: return ewc_adamw_stored<Stored::float32>(c, s, on);
    case Stored::bfloat16: return ewc_adamw_stored<Stored::bfloat16>(c, s, on);
    default: return ewc_adamw_stored<Stored::mixed>(c, s, on);
  }
}

// Squares in double: a float would overflow from |g| = 1.8e19 on and lose what is below 1e-23.
template <Stored stored>
double square_sum_stored(const View& view, std::int64_t numel) {
  Block<stored> column(view);
  alignas(64) double lane[kLanes] = {};
  for_each_block(numel, [&](std::int64_t offset, auto n) {
    column.load(offset, n);
    for (int first = 0; first < n; first += kLanes) {
      const int count = std::min<int>(kLanes, n - first);
#pragma omp simd
      for (int l = 0; l < count; ++l) {
        const double wide = column.get(first + l);
        lane[l] += wide * wide;
      }
    }
  });
  double sum = 0.0;
  for (double partial : lane) sum += partial;
  return sum;
}

double square_sum(const View& view, std::int64_t numel) {
  switch (stored_as({view}, Rounding{})) {
    case Stored::float32: return square_sum_stored<Stored::float32>(view, numel);
    case Stored::bfloat16: return square_sum_stored<Stored::bfloat16>(view, numel);
    default: return square_sum_stored<Stored::mixed>(view, numel);
  }
}

template <int count_written>
void stream_words(const Streams& streams, std::int64_t start, std::int64_t words) {
  for_each_block(words, [&](std::int64_t offset, auto n) {
    const std::uint32_t *a = streams.read[0] + start + offset,
                        *b = streams.read[1] + start + offset,
                        *c = streams.read[2] + start + offset;
    std::uint32_t* out[3];
    for (int k = 0; k < count_written; ++k) out[k] = streams.written[k] + start + offset;
    for (int ahead = kAhead / 4; ahead < kAhead / 4 + kBlock; ahead += 16) {
      __builtin_prefetch(a + ahead);
      __builtin_prefetch(b + ahead);
      __builtin_prefetch(c + ahead);
      for (int k = 0; k < count_written; ++k) __builtin_prefetch(out[k] + ahead);
    }
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const std::uint32_t word = a[i] ^ b[i] ^ c[i];
      for (int k = 0; k < count_written; ++k) out[k][i] ^= word;
    }
  });
}

void stream(const Streams& streams, std::int64_t offset, std::int64_t n) {
  streams.written[2] == nullptr ? stream_words<2>(streams, offset, n)
                                : stream_words<3>(streams, offset, n);
}

} // namespace

const ChunkKernels& BDU_CONCATENATE(chunk_kernels_, BDU_ISA)() {
  static const ChunkKernels kernels{BDU_STRING(BDU_ISA), ewc_sgd, ewc_adamw, square_sum, stream};
  return kernels;
}

} // namespace bdu::cpu
