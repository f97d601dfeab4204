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
  for (std::int64_t first = 0; first < rows; first += kRows) {
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

// Up to `count` elements as floats: in place where they are floats that lie together.
const float* floats(const Matrix& matrix, std::int64_t offset, std::int64_t stride, int count,
                    float* buffer) {
  if (matrix.dtype == Dtype::float32 && stride == 1)
    return static_cast<const float*>(matrix.data) + offset;
  const auto* bytes = static_cast<const char*>(matrix.data) + offset * bytes_of(matrix.dtype);
  pack({bytes, matrix.dtype, 0, stride}, 1, count, count, buffer);
  return buffer;
}

float at(const Statistic& statistic, std::int64_t step, int channel, float missing) {
  if (statistic.data == nullptr) return missing;
  return statistic.data[step * statistic.step_stride + channel * statistic.channel_stride];
}

void affine_by_step(const Affine& affine) {
  alignas(64) float products[kAffineChannels] = {}, sums[kAffineChannels] = {};
  alignas(64) float a_buffer[kAffineChannels], g_buffer[kAffineChannels];
  alignas(64) float mean[kAffineChannels], scale[kAffineChannels];
  const int n = affine.channels;
  const bool varies = affine.mean.step_stride != 0 || affine.inverse_deviation.step_stride != 0;
  for (std::int64_t step = 0; step < affine.steps; ++step) {
    const Matrix &am = affine.activations, &gm = affine.gradients;
    const float* g = floats(gm, step * gm.row_stride, gm.column_stride, n, g_buffer);
    for (int c = 0; c < n; ++c) sums[c] += g[c];
    if (am.data == nullptr) continue;
    if (step == 0 || varies)
      for (int c = 0; c < n; ++c) {
        mean[c] = at(affine.mean, step, c, 0.0f);
        scale[c] = at(affine.inverse_deviation, step, c, 1.0f);
      }
    const float* a = floats(am, step * am.row_stride, am.column_stride, n, a_buffer);
    for (int c = 0; c < n; ++c) products[c] += g[c] * ((a[c] - mean[c]) * scale[c]);
  }
  std::copy_n(sums, n, affine.sums);
  std::copy_n(products, n, affine.products);
}

void affine_by_channel(const Affine& affine) {
  constexpr int kSteps = 256, kPartial = 16;
  alignas(64) float a_buffer[kSteps], g_buffer[kSteps];
  const Matrix &am = affine.activations, &gm = affine.gradients;
  for (int c = 0; c < affine.channels; ++c) {
    alignas(64) float products[kPartial] = {}, sums[kPartial] = {};
    const float mean = at(affine.mean, 0, c, 0.0f);
    const float scale = at(affine.inverse_deviation, 0, c, 1.0f);
    for (std::int64_t step = 0; step < affine.steps; step += kSteps) {
      const int n = static_cast<int>(std::min<std::int64_t>(kSteps, affine.steps - step));
      const float* g =
          floats(gm, step * gm.row_stride + c * gm.column_stride, gm.row_stride, n, g_buffer);
      const float* a = am.data == nullptr ? g
                                          : floats(am, step * am.row_stride + c * am.column_stride,
                                                   am.row_stride, n, a_buffer);
      int i = 0;
      for (; i + kPartial <= n; i += kPartial)
        for (int k = 0; k < kPartial; ++k) {
          sums[k] += g[i + k];
          products[k] += g[i + k] * (a[i + k] - mean);
        }
      for (int k = 0; i < n; ++i, ++k) {
        sums[k] += g[i];
        products[k] += g[i] * (a[i] - mean);
      }
    }
    float sum = 0.0f, product = 0.0f;
    for (int k = 0; k < kPartial; ++k) {
      sum += sums[k];
      product += products[k];
    }
    affine.sums[c] = sum;
    affine.products[c] = product * scale;
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
