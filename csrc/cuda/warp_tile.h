// What one lane of one warp does, free of CUDA: compiled for the device by kernels.cu and for the
// host by on_host.cpp, which walks over every (tile, lane) and so tests this very arithmetic.
//
// A launch covers all tensors of a table. The elements of each are cut into tiles; a warp takes a
// tile at a time, finds its tensor by binary search, and its lanes take neighbouring elements, 16
// bytes of each column: 4 where all is float32, else 8 (and then 32 bytes of a float32 column).
#pragma once

#include <cstdint>

#include "../convert.h"
#include "../table.h"
#include "../update_rule.h"
#include "memory.h"

#if defined(__CUDACC__)
#define BDU_UNROLL _Pragma("unroll")
#else
#define BDU_UNROLL
#endif

namespace bdu::cuda {

constexpr int kLanes = 32;
template <Stored stored>
constexpr int kVector = stored == Stored::float32 ? 4 : 8; // elements a lane takes at a time
constexpr int kTile = 1024; // the order of the penalty's sum, so part of its bits
constexpr int kThreads = 256;

// Rows of 64-bit cells on the device, one column of cells a tensor; bdu/cuda.py fills them.
class Table {
 public:
  Table(const std::int64_t* cells, std::int64_t tensors) : cells_(cells), tensors_(tensors) {}

  BDU_HD std::int64_t first_tile(std::int64_t tensor) const { return cells_[tensor]; }
  BDU_HD std::int64_t numel(std::int64_t tensor) const { return cells_[tensors_ + tensor]; }
  // Four bits a column, the first lowest.
  BDU_HD std::int64_t dtypes(std::int64_t tensor) const { return cells_[2 * tensors_ + tensor]; }
  // 0 where the tensor has no such column. Behind the addresses: the first element's number,
  // counted over all tensors of the optimizer.
  BDU_HD std::int64_t address(int column, std::int64_t tensor) const {
    return cells_[(3 + column) * tensors_ + tensor];
  }

  // The last tensor whose first tile is not behind this one; empty ones share theirs with the next.
  BDU_HD std::int64_t tensor_of(std::int64_t tile) const {
    std::int64_t low = 0, high = tensors_ - 1;
    while (low < high) {
      const std::int64_t middle = (low + high + 1) / 2;
      if (first_tile(middle) <= tile)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }

 private:
  const std::int64_t* cells_;
  std::int64_t tensors_;
};

// Where a tile lies, the same for all lanes of a warp.
struct Tile {
  BDU_HD Tile(const Table& table, std::int64_t index) {
    tensor = table.tensor_of(index);
    start = (index - table.first_tile(tensor)) * kTile;
    const std::int64_t left = table.numel(tensor) - start;
    n = static_cast<int>(left < kTile ? left : kTile);
    dtypes = table.dtypes(tensor);
  }

  std::int64_t tensor, start, dtypes;
  int n;
};

// Neighbouring elements of one column. All columns are loaded before any is converted, so
// that a lane waits for the memory once.
template <Stored stored>
class Vector {
  static constexpr int kCount = kVector<stored>;
  static constexpr bool kWide = stored == Stored::mixed; // 8 of float32 take two packs

 public:
  // A Fisher in 8 bits has its scales in another column.
  BDU_HD Vector(const Table& table, const Tile& tile, int column, int scale_column = -1)
      : address_(table.address(column, tile.tensor)),
        dtype_(stored == Stored::mixed ? static_cast<Dtype>((tile.dtypes >> (4 * column)) & 15)
                                       : static_cast<Dtype>(stored)) {
    if (address_ != 0) address_ += tile.start * bytes_of(dtype_);
    if constexpr (stored == Stored::mixed) {
      if (scale_column >= 0 && bytes_of(dtype_) == 1)
        scales_ = table.address(scale_column, tile.tensor) + tile.start / kScaleBlock * 2;
    }
  }

  BDU_HD bool is_there() const { return address_ != 0; }
  BDU_HD bool is_aligned() const { return (address_ & 15) == 0; }

  // `n` of the elements from `index` on; the others read as 0. Whole vectors are aligned.
  BDU_HD void load(int index, int n, bool whole) {
    const std::int64_t at = address_ + std::int64_t{index} * bytes_of(dtype_);
    if (is_8_bits()) scale_ = cuda::load<std::uint16_t>(scales_ + index / kScaleBlock * 2);
    if (whole && is_8_bits()) {
      const auto both = cuda::load<std::uint64_t>(at);
      word(0) = static_cast<std::uint32_t>(both);
      word(1) = static_cast<std::uint32_t>(both >> 32);
    } else if (whole) {
      pack_[0] = cuda::load<Pack>(at);
      if (kWide && is_float32()) pack_[kWide] = cuda::load<Pack>(at + 16);
    } else if (is_float32()) {
      BDU_UNROLL
      for (int j = 0; j < kCount; ++j) word(j) = j < n ? cuda::load<std::uint32_t>(at + 4 * j) : 0u;
    } else if (is_8_bits()) {
      word(0) = word(1) = 0u;
      BDU_UNROLL
      for (int j = 0; j < kCount; ++j)
        if (j < n) word(j / 4) |= std::uint32_t{cuda::load<std::uint8_t>(at + j)} << (8 * (j % 4));
    } else {
      BDU_UNROLL
      for (int j = 0; j < kCount; ++j)
        set_half(j, j < n ? cuda::load<std::uint16_t>(at + 2 * j) : std::uint16_t{0});
    }
  }

  BDU_HD float get(int j) const {
    if (is_float32()) return float_of(word(j));
    if (is_8_bits())
      return from_8_bits(dtype_, static_cast<std::uint8_t>(word(j / 4) >> (8 * (j % 4))),
                         scale_of_8_bits(dtype_, scale_));
    const auto half = static_cast<std::uint16_t>(word(j / 2) >> (16 * (j & 1)));
    return dtype_ == Dtype::bfloat16 ? from_bfloat16(half) : from_float16(half);
  }

  BDU_HD void set(int j, float value) {
    if (is_float32()) {
      word(j) = bits_of(value);
      return;
    }
    set_half(j, dtype_ == Dtype::bfloat16 ? to_bfloat16(value) : to_float16(value));
  }

  // As a parameter, which may be rounded stochastically; `element` is that of j = 0.
  BDU_HD void set_param(int j, float value, const Rounding& rounding, std::int64_t element) {
    if (stored == Stored::mixed && rounding.is_stochastic && dtype_ == Dtype::bfloat16)
      set_half(j, to_bfloat16_stochastic(value, random_bits(rounding, element + j)));
    else
      set(j, value);
  }

  BDU_HD void store(int index, int n, bool whole) const {
    const std::int64_t at = address_ + std::int64_t{index} * bytes_of(dtype_);
    if (whole) {
      cuda::store(at, pack_[0]);
      if (kWide && is_float32()) cuda::store(at + 16, pack_[kWide]);
    } else if (is_float32()) {
      BDU_UNROLL
      for (int j = 0; j < kCount; ++j)
        if (j < n) cuda::store(at + 4 * j, word(j));
    } else {
      BDU_UNROLL
      for (int j = 0; j < kCount; ++j)
        if (j < n)
          cuda::store(at + 2 * j, static_cast<std::uint16_t>(word(j / 2) >> (16 * (j & 1))));
    }
  }

 private:
  BDU_HD void set_half(int j, std::uint32_t half) {
    std::uint32_t& both = word(j / 2);
    both = j & 1 ? (both & 0x0000ffffu) | half << 16 : (both & 0xffff0000u) | half;
  }
  BDU_HD bool is_float32() const { return dtype_ == Dtype::float32; }
  BDU_HD bool is_8_bits() const { return stored == Stored::mixed && bytes_of(dtype_) == 1; }
  BDU_HD std::uint32_t word(int j) const { return pack_[kWide ? j / 4 : 0].word[j % 4]; }
  BDU_HD std::uint32_t& word(int j) { return pack_[kWide ? j / 4 : 0].word[j % 4]; }

  std::int64_t address_;
  Dtype dtype_;
  Pack pack_[kWide ? 2 : 1] = {};
  std::int64_t scales_ = 0;
  std::uint16_t scale_ = 0;
};

// Values that only the device knows; null where the host has put them into the scalars.
struct OnDevice {
  const float *clip, *grad_scale, *found_inf, *lr, *ewc_lambda;
  const std::int64_t* rounding_step;

  // GradScaler found a gradient that is not finite: nothing may be written.
  BDU_HD bool is_skipped() const { return found_inf != nullptr && *found_inf != 0.0f; }

  BDU_HD void apply(PullScalars& s) const {
    if (clip != nullptr) s.grad_factor *= *clip;
    if (grad_scale != nullptr) {
      s.inverse_scale = 1.0f / *grad_scale;
      s.grad_factor *= s.inverse_scale;
    }
    if (rounding_step != nullptr) s.rounding.step = *rounding_step;
    if (lr != nullptr) s.lr = *lr;
    if (ewc_lambda != nullptr) s.ewc_lambda = *ewc_lambda;
    if (lr != nullptr || ewc_lambda != nullptr) s.lr_lambda = fminf(s.lr * s.ewc_lambda, 3.4e38f);
  }
};

// In pairs, so that the rounding errors do not pile up.
template <int count>
BDU_HD float tree_sum(const float* value) {
  if constexpr (count == 1)
    return value[0];
  else
    return tree_sum<count / 2>(value) + tree_sum<count / 2>(value + count / 2);
}

// What the kernel is not compiled for; the same for a whole launch.
struct Flags {
  bool nesterov, update_fisher;
};

// Steps the lane's elements of one tile and returns their sum of F d^2, at theta before the step.
template <Stored stored, Pull asked, bool has_momentum>
BDU_HD float ewc_sgd_lane(const Table& table, std::int64_t index, int lane, const SgdScalars& s,
                          const Flags& on, bool is_skipped) {
  constexpr int kCount = kVector<stored>;
  const Tile tile(table, index);
  Vector<stored> param(table, tile, 0), grad(table, tile, 1), momentum_buffer(table, tile, 2),
      fisher(table, tile, 3, 5), anchor(table, tile, 4);
  // A tensor without Fisher or anchor is stepped without pull and adds no penalty.
  const bool is_pulled = asked != Pull::none && fisher.is_there() && anchor.is_there();
  const bool has_fisher = is_pulled || (on.update_fisher && fisher.is_there());
  const bool is_aligned =
      param.is_aligned() && grad.is_aligned() && (!has_momentum || momentum_buffer.is_aligned()) &&
      (!has_fisher || fisher.is_aligned()) && (!is_pulled || anchor.is_aligned());
  const std::int64_t first_element = table.address(6, tile.tensor) + tile.start;
  float penalty = 0.0f;
  for (int i = lane * kCount; i < tile.n; i += kLanes * kCount) {
    const int n = tile.n - i < kCount ? tile.n - i : kCount;
    const bool whole = is_aligned && n == kCount;
    param.load(i, n, whole);
    grad.load(i, n, whole);
    if (has_momentum) momentum_buffer.load(i, n, whole);
    if (has_fisher) fisher.load(i, n, whole);
    if (is_pulled) anchor.load(i, n, whole);
    float sum[kCount];
    BDU_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const float p = param.get(j), g = grad.get(j), f = has_fisher ? fisher.get(j) : 0.0f;
      const float a = is_pulled ? anchor.get(j) : p, drift = p - a;
      sum[j] = is_pulled ? f * drift * drift : 0.0f;
      float momentum = has_momentum ? momentum_buffer.get(j) : 0.0f;
      const float direction = pulled_gradient<asked>(g, drift, is_pulled ? f : 0.0f, s.pull);
      float next = on.nesterov ? sgd_update<asked, has_momentum, true>(p, direction, momentum, s)
                               : sgd_update<asked, has_momentum, false>(p, direction, momentum, s);
      if (asked == Pull::proximal && is_pulled) next = proximal_pull(next, f, a, s.pull);
      if (on.update_fisher) fisher.set(j, running_fisher(f, g, s.pull));
      if (has_momentum) momentum_buffer.set(j, momentum);
      param.set_param(j, next, s.pull.rounding, first_element + i);
    }
    penalty += tree_sum<kCount>(sum);
    if (is_skipped) continue;
    param.store(i, n, whole);
    if (has_momentum) momentum_buffer.store(i, n, whole);
    if (on.update_fisher && has_fisher) fisher.store(i, n, whole);
  }
  return penalty;
}

// AdamW's scalars of one tensor. expm1 keeps the digits that 1 - beta^t would lose.
BDU_HD AdamwScalars with_bias_corrections(AdamwScalars s, float log_beta1, float log_beta2,
                                          float step) {
  s.step_size = s.pull.lr / -expm1f(step * log_beta1);
  s.inverse_sqrt_bias_correction2 = 1.0f / __builtin_sqrtf(-expm1f(step * log_beta2));
  return s;
}

struct AdamwLogs {
  float beta1, beta2;
};

template <Stored stored, Pull asked>
BDU_HD float ewc_adamw_lane(const Table& table, std::int64_t index, int lane,
                            const AdamwScalars& shared, const AdamwLogs& logs, const float* steps,
                            const Flags& on, bool is_skipped) {
  constexpr int kCount = kVector<stored>;
  const Tile tile(table, index);
  Vector<stored> param(table, tile, 0), grad(table, tile, 1), exp_avg(table, tile, 2),
      exp_avg_sq(table, tile, 3), fisher(table, tile, 4, 6), anchor(table, tile, 5);
  const bool is_pulled = asked != Pull::none && fisher.is_there() && anchor.is_there();
  const bool has_fisher = is_pulled || (on.update_fisher && fisher.is_there());
  const bool is_aligned = param.is_aligned() && grad.is_aligned() && exp_avg.is_aligned() &&
                          exp_avg_sq.is_aligned() && (!has_fisher || fisher.is_aligned()) &&
                          (!is_pulled || anchor.is_aligned());
  const AdamwScalars s = with_bias_corrections(shared, logs.beta1, logs.beta2, steps[tile.tensor]);
  const std::int64_t first_element = table.address(7, tile.tensor) + tile.start;
  float penalty = 0.0f;
  for (int i = lane * kCount; i < tile.n; i += kLanes * kCount) {
    const int n = tile.n - i < kCount ? tile.n - i : kCount;
    const bool whole = is_aligned && n == kCount;
    param.load(i, n, whole);
    grad.load(i, n, whole);
    exp_avg.load(i, n, whole);
    exp_avg_sq.load(i, n, whole);
    if (has_fisher) fisher.load(i, n, whole);
    if (is_pulled) anchor.load(i, n, whole);
    float sum[kCount];
    BDU_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const float p = param.get(j), g = grad.get(j), f = has_fisher ? fisher.get(j) : 0.0f;
      const float a = is_pulled ? anchor.get(j) : p, drift = p - a;
      sum[j] = is_pulled ? f * drift * drift : 0.0f;
      const float direction = pulled_gradient<asked>(g, drift, is_pulled ? f : 0.0f, s.pull);
      float first = exp_avg.get(j), second = exp_avg_sq.get(j);
      float next = adamw_update(p, direction, first, second, s);
      if (asked == Pull::proximal && is_pulled) next = proximal_pull(next, f, a, s.pull);
      if (on.update_fisher) fisher.set(j, running_fisher(f, g, s.pull));
      exp_avg.set(j, first);
      exp_avg_sq.set(j, second);
      param.set_param(j, next, s.pull.rounding, first_element + i);
    }
    penalty += tree_sum<kCount>(sum);
    if (is_skipped) continue;
    param.store(i, n, whole);
    exp_avg.store(i, n, whole);
    exp_avg_sq.store(i, n, whole);
    if (on.update_fisher && has_fisher) fisher.store(i, n, whole);
  }
  return penalty;
}

// Squares in double: a float would overflow from |g| = 1.8e19 on and lose what is below 1e-23.
template <Stored stored>
BDU_HD double square_sum_lane(const Table& table, std::int64_t index, int lane, int which) {
  constexpr int kCount = kVector<stored>;
  const Tile tile(table, index);
  Vector<stored> column(table, tile, which);
  double sum = 0.0;
  for (int i = lane * kCount; i < tile.n; i += kLanes * kCount) {
    const int n = tile.n - i < kCount ? tile.n - i : kCount;
    column.load(i, n, column.is_aligned() && n == kCount);
    BDU_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const double wide = column.get(j);
      sum += wide * wide;
    }
  }
  return sum;
}

// The second stage: what one of kThreads threads adds of the tiles' sums.
template <class T>
BDU_HD double partial_sum(const T* partials, std::int64_t tiles, int thread) {
  double sum = 0.0;
  for (std::int64_t i = thread; i < tiles; i += kThreads) {
#if defined(__CUDA_ARCH__)
    sum += static_cast<double>(__ldcg(partials + i)); // written by other processors of this launch
#else
    sum += static_cast<double>(partials[i]);
#endif
  }
  return sum;
}

} // namespace bdu::cuda
