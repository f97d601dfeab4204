// Registers hold a tile of one sample's gradient: per step, kTileVectors loads of activations, a
// broadcast a row of gradients, and a multiplication-addition for each register. The floor is the
// machine's multiply-add rate; both operands come from the nearest caches, packed.
#include "fisher_kernels.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../convert.h"

#define BDU_CONCATENATE_(a, b) a##b
#define BDU_CONCATENATE(a, b) BDU_CONCATENATE_(a, b)

namespace bdu::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kOutputs = 14; // 28 of 32 registers add up
#elif defined(__AVX2__)
constexpr int kLanes = 8, kOutputs = 6; // 12 of 16
#else
constexpr int kLanes = 4, kOutputs = 6;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

float from(float value) { return value; }
struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
float from(Bfloat16 value) { return from_bfloat16(value.bits); }
float from(Float16 value) { return from_float16(value.bits); }

typedef std::int32_t Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// Turns kLanes vectors of rows into kLanes of columns: at each distance, pairs exchange halves.
template <int distance = 1>
void transpose(Vector (&v)[kLanes]) {
  Lanes low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & distance ? kLanes + lane - distance : lane;
    high[lane] = lane & distance ? kLanes + lane : lane + distance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & distance) continue;
    const Vector a = v[i], b = v[i + distance];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + distance] = __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * distance < kLanes) transpose<2 * distance>(v);
}

// Rows that lie together, columns that do not: kLanes by kLanes of them at a time. Returns how many
// rows are done; the last ones are not, as a vector is written where a row may be shorter.
std::int64_t pack_transposed(const float* data, std::int64_t column_stride, std::int64_t rows,
                             int columns, int width, float* out) {
  const std::int64_t last = width >= kLanes ? rows - rows % kLanes : rows - kLanes;
  std::int64_t row = 0;
  for (; row + kLanes <= last; row += kLanes)
    for (int first = 0; first < columns; first += kLanes) {
      // what is written beyond the width belongs to the next row, and is written again
      if (first > 0 && first + kLanes > width) return 0;
      Vector block[kLanes];
      for (int c = 0; c < kLanes; ++c)
        block[c] = first + c < columns ? load(data + (first + c) * column_stride + row) : Vector{};
      transpose(block);
      for (int r = 0; r < kLanes; ++r) store(out + (row + r) * width + first, block[r]);
    }
  return row;
}

template <class Element>
void pack_as(const Matrix& matrix, std::int64_t rows, int columns, int width, float* out) {
  const auto* data = static_cast<const Element*>(matrix.data);
  if (matrix.column_stride == 1) {
    std::int64_t row = 0;
    if constexpr (std::is_same_v<Element, float>) {
      // A vector at once, where what is read too much belongs to the next row, and what is written
      // too much is written again. The tile's rows are short, and copying them is not for nothing.
      if (columns == width && columns <= kLanes && matrix.row_stride + columns >= kLanes)
        for (; row < rows - kLanes; ++row)
          store(out + row * width, load(data + row * matrix.row_stride));
      else if (columns == width && columns == 2 * kLanes)
        for (; row < rows; ++row)
          for (int half = 0; half < 2 * kLanes; half += kLanes)
            store(out + row * width + half, load(data + row * matrix.row_stride + half));
    }
    for (; row < rows; ++row) {
      const Element* in = data + row * matrix.row_stride;
      float* to = out + row * width;
      for (int column = 0; column < columns; ++column) to[column] = from(in[column]);
      for (int column = columns; column < width; ++column) to[column] = 0.0f;
    }
    return;
  }
  // A few rows at a time, so that what is written stays in the nearest cache.
  constexpr std::int64_t kRows = 64;
  std::int64_t done = 0;
  if constexpr (std::is_same_v<Element, float>)
    if (matrix.row_stride == 1 && width - columns < kLanes &&
        (width <= kLanes || width % kLanes == 0))
      done = pack_transposed(data, matrix.column_stride, rows, columns, width, out);
  for (std::int64_t first = done; first < rows; first += kRows) {
    const std::int64_t last = std::min(rows, first + kRows);
    for (int column = 0; column < columns; ++column) {
      const Element* in = data + column * matrix.column_stride;
      for (std::int64_t row = first; row < last; ++row)
        out[row * width + column] = from(in[row * matrix.row_stride]);
    }
    for (int column = columns; column < width; ++column)
      for (std::int64_t row = first; row < last; ++row) out[row * width + column] = 0.0f;
  }
}

void pack(const Matrix& matrix, std::int64_t rows, int columns, int width, float* out) {
  switch (matrix.dtype) {
    case Dtype::float32: return pack_as<float>(matrix, rows, columns, width, out);
    case Dtype::bfloat16: return pack_as<Bfloat16>(matrix, rows, columns, width, out);
    default: return pack_as<Float16>(matrix, rows, columns, width, out);
  }
}

void column_sums(const float* rows, std::int64_t count, int width, float* sums) {
  for (int first = 0; first < width; first += kLanes) {
    Vector sum = {};
    for (std::int64_t row = 0; row < count; ++row) sum += load(rows + row * width + first);
    store(sums + first, sum);
  }
}

void gather(const float* image, const Positions& at, const Segment* segments, int count, int width,
            float* out) {
  for (std::int64_t y = 0; y < at.height; ++y)
    for (std::int64_t x = 0; x < at.width; ++x, out += width) {
      const float* place = image + y * at.row_stride + x * at.column_stride;
      int filled = 0;
      for (int s = 0; s < count; ++s) {
        const float* in = place + segments[s].offset;
        float* to = out + segments[s].column;
        int i = 0;
        for (; i + kLanes <= segments[s].length; i += kLanes) store(to + i, load(in + i));
        for (; i < segments[s].length; ++i) to[i] = in[i];
        filled = segments[s].column + segments[s].length;
      }
      for (; filled < width; ++filled) out[filled] = 0.0f;
    }
}

template <int outputs, int vectors>
void tile_of(const Tile& tile) {
  const Positions& at = tile.positions;
  const float* g = tile.gradients;
  for (std::int64_t sample = 0; sample < tile.samples; ++sample) {
    Vector sum[outputs][vectors] = {};
    for (std::int64_t y = 0; y < at.height; ++y) {
      const float* row = tile.activations + sample * tile.sample_stride + y * at.row_stride;
      const float* from[vectors];
      for (int v = 0; v < vectors; ++v) from[v] = row + tile.offset[v];
      for (std::int64_t x = 0; x < at.width; ++x) {
        Vector input[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) input[v] = load(from[v] + x * at.column_stride);
#pragma GCC unroll 16
        for (int o = 0; o < outputs; ++o) {
          const float gradient = g[o];
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) sum[o][v] += gradient * input[v];
        }
        g += outputs;
      }
    }
    if (tile.sums != nullptr)
      for (int o = 0; o < outputs; ++o)
        for (int v = 0; v < vectors; ++v) {
          float* plain = tile.sums + (o * vectors + v) * kLanes;
          store(plain, load(plain) + sum[o][v]);
        }
    if (tile.kept != nullptr) {
      const std::int32_t* index = tile.kept_index + sample * tile.kept_index_stride;
      for (int o = 0; o < outputs; ++o) {
        if (index[o] < 0) continue;
        float* kept = tile.kept + index[o] * tile.kept_stride;
        const auto* own = reinterpret_cast<const float*>(sum[o]);
        for (int i = 0; i < tile.inputs; ++i) kept[i] += own[i];
        for (int v = 0; v < vectors; ++v) sum[o][v] = Vector{};
      }
    }
#pragma GCC unroll 16
    for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        float* square = tile.squares + (o * vectors + v) * kLanes;
        store(square, load(square) + sum[o][v] * sum[o][v]);
      }
    }
  }
}

using TileFunction = void (*)(const Tile&);

template <int vectors, int... i>
constexpr std::array<TileFunction, sizeof...(i)> tiles_of(std::integer_sequence<int, i...>) {
  return {tile_of<i + 1, vectors>...};
}

void tile(const Tile& tile) {
  static constexpr auto narrow = tiles_of<1>(std::make_integer_sequence<int, kOutputs>());
  static constexpr auto wide = tiles_of<2>(std::make_integer_sequence<int, kOutputs>());
  (tile.vectors == 1 ? narrow : wide)[tile.outputs - 1](tile);
}

// One input channel for each output channel: channels are the lanes, a few taps are in registers.
template <int taps>
void depthwise_taps(const Depthwise& d, const Positions& at, int first) {
  Vector sum[taps] = {};
  const float* g = d.gradients;
  for (std::int64_t y = 0; y < at.height; ++y)
    for (std::int64_t x = 0; x < at.width; ++x, g += d.gradient_stride) {
      const float* place = d.image + y * at.row_stride + x * at.column_stride;
      const Vector gradient = load(g);
#pragma GCC unroll 16
      for (int k = 0; k < taps; ++k) sum[k] += gradient * load(place + d.taps[first + k]);
    }
  for (int k = 0; k < taps; ++k) {
    float* square = d.squares + (first + k) * kLanes;
    store(square, load(square) + sum[k] * sum[k]);
    if (d.sums != nullptr) {
      float* plain = d.sums + (first + k) * kLanes;
      store(plain, load(plain) + sum[k]);
    }
  }
}

void depthwise(const Depthwise& d, const Positions& at) {
  int k = 0;
  for (; k + 9 <= d.count; k += 9) depthwise_taps<9>(d, at, k);
  for (; k + 3 <= d.count; k += 3) depthwise_taps<3>(d, at, k);
  for (; k < d.count; ++k) depthwise_taps<1>(d, at, k);
}

// `count` elements of a matrix as floats: in place where they are floats that lie together.
const float* floats(const Matrix& matrix, std::int64_t offset, std::int64_t stride, int count,
                    float* buffer) {
  if (matrix.dtype == Dtype::float32 && stride == 1)
    return static_cast<const float*>(matrix.data) + offset;
  const auto* bytes = static_cast<const char*>(matrix.data) + offset * bytes_of(matrix.dtype);
  pack({bytes, matrix.dtype, 0, stride}, 1, count, count, buffer);
  return buffer;
}

constexpr int kPair = 2 * kLanes;

// Two vectors of channels, zeros where there are fewer.
struct Pair {
  Vector low = {}, high = {};

  void read(const float* from, int count) {
    if (count == kPair) {
      low = load(from), high = load(from + kLanes);
      return;
    }
    float own[kPair] = {};
    std::copy_n(from, count, own);
    low = load(own), high = load(own + kLanes);
  }
  void write(float* to, int count) const {
    float own[kPair];
    store(own, low), store(own + kLanes, high);
    std::copy_n(own, count, to);
  }
};

Pair read(const Statistic& statistic, std::int64_t step, int first, int count, float missing) {
  float own[kPair] = {};
  for (int c = 0; c < count; ++c)
    own[c] =
        statistic.data == nullptr
            ? missing
            : statistic.data[step * statistic.step_stride + (first + c) * statistic.channel_stride];
  Pair pair;
  pair.read(own, kPair);
  return pair;
}

// Channels that lie together are the lanes; steps add up.
void affine_by_step(const Affine& affine) {
  const Matrix &am = affine.activations, &gm = affine.gradients;
  const Statistic &mean = affine.mean, &scale = affine.inverse_deviation;
  const bool varies = mean.step_stride != 0 || scale.step_stride != 0;
  const bool one = mean.channel_stride == 0 && scale.channel_stride == 0; // for all channels
  float a_buffer[kPair], g_buffer[kPair];
  for (int first = 0; first < affine.channels; first += kPair) {
    const int count = std::min(kPair, affine.channels - first);
    Pair sum, product, m = read(mean, 0, first, count, 0.0f),
                       s = read(scale, 0, first, count, 1.0f);
    Pair a, g;
    for (std::int64_t step = 0; step < affine.steps; ++step) {
      const std::int64_t g_offset = step * gm.row_stride + first * gm.column_stride;
      g.read(floats(gm, g_offset, gm.column_stride, count, g_buffer), count);
      sum.low += g.low, sum.high += g.high;
      if (am.data == nullptr) continue;
      if (varies && one) {
        m.low = m.high =
            Vector{} + (mean.data == nullptr ? 0.0f : mean.data[step * mean.step_stride]);
        s.low = s.high =
            Vector{} + (scale.data == nullptr ? 1.0f : scale.data[step * scale.step_stride]);
      } else if (varies) {
        m = read(mean, step, first, count, 0.0f), s = read(scale, step, first, count, 1.0f);
      }
      const std::int64_t a_offset = step * am.row_stride + first * am.column_stride;
      a.read(floats(am, a_offset, am.column_stride, count, a_buffer), count);
      product.low += g.low * ((a.low - m.low) * s.low);
      product.high += g.high * ((a.high - m.high) * s.high);
    }
    sum.write(affine.sums + first, count);
    product.write(affine.products + first, count);
  }
}

// Steps of a channel that lie together are the lanes.
void affine_by_channel(const Affine& affine) {
  constexpr int kSteps = 256;
  float a_buffer[kSteps], g_buffer[kSteps];
  const Matrix &am = affine.activations, &gm = affine.gradients;
  for (int c = 0; c < affine.channels; ++c) {
    const Statistic &means = affine.mean, &scales = affine.inverse_deviation;
    const float mean = means.data == nullptr ? 0.0f : means.data[c * means.channel_stride];
    const float scale = scales.data == nullptr ? 1.0f : scales.data[c * scales.channel_stride];
    Pair sum, product;
    for (std::int64_t step = 0; step < affine.steps; step += kSteps) {
      const int n = static_cast<int>(std::min<std::int64_t>(kSteps, affine.steps - step));
      const float* g =
          floats(gm, step * gm.row_stride + c * gm.column_stride, gm.row_stride, n, g_buffer);
      const float* a = g; // its product is not asked for
      if (am.data != nullptr)
        a = floats(am, step * am.row_stride + c * am.column_stride, am.row_stride, n, a_buffer);
      for (int i = 0; i < n; i += kPair) {
        const int count = std::min(kPair, n - i);
        Pair x, y;
        x.read(a + i, count), y.read(g + i, count);
        sum.low += y.low, sum.high += y.high;
        product.low += y.low * (x.low - mean);
        product.high += y.high * (x.high - mean);
      }
    }
    const auto total = [](const Pair& pair) {
      const Vector both = pair.low + pair.high;
      float lane = 0.0f;
      for (int l = 0; l < kLanes; ++l) lane += both[l];
      return lane;
    };
    affine.sums[c] = total(sum);
    affine.products[c] = total(product) * scale;
  }
}

void affine(const Affine& affine) {
  const bool steps_together = affine.gradients.row_stride == 1 && affine.steps > 1 &&
                              affine.mean.step_stride == 0 &&
                              affine.inverse_deviation.step_stride == 0;
  steps_together ? affine_by_channel(affine) : affine_by_step(affine);
}

} // namespace

const FisherKernels& BDU_CONCATENATE(fisher_kernels_, BDU_ISA)() {
  static const FisherKernels kernels{kLanes, kOutputs, pack,      column_sums,
                                     gather, tile,     depthwise, affine};
  return kernels;
}

} // namespace bdu::cpu
