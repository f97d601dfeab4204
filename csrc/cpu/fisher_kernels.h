// The inner loops of the exact Fisher. Compiled once per instruction set, see fisher_kernels.cpp.
//
// A parameter's gradient of one sample is a sum over positions t ("steps") of products
// gradient[t][output] * activation[t][input]. It is formed tile by tile in registers, squared there
// and added to the tile of the Fisher; it never reaches memory.
#pragma once

#include <cstdint>

#include "../table.h"

namespace bdu::cpu {

constexpr int kTileVectors = 2;                   // vectors of inputs in a tile
constexpr int kMostLanes = 16, kMostOutputs = 14; // of every instruction set

struct Matrix { // strides in elements
  const void* data;
  Dtype dtype;
  std::int64_t row_stride, column_stride;
};

// The steps of a sample as places: a row of them, or those of a convolution's output in a padded,
// channels-last image. Strides in floats.
struct Positions {
  std::int64_t height, width;
  std::int64_t row_stride, column_stride;
};

// All samples of a block against one tile of weights.
struct Tile {
  int outputs, vectors;
  std::int64_t samples;
  Positions positions;
  const float* activations; // of the first sample at the first position
  std::int64_t sample_stride;
  std::int64_t offset[kTileVectors]; // of each vector of inputs from a position
  const float* gradients;            // (samples, positions, outputs)
  float* squares;                    // (outputs, vectors * lanes), added to
  float* sums;                       // likewise without the square, or null
  // Rows that are added to kept[kept_index[sample][output]] in place of the square; null: none.
  float* kept;                    // at the tile's first input
  const std::int32_t* kept_index; // at the block's first sample and the tile's first output
  std::int64_t kept_stride, kept_index_stride;
  int inputs; // of the tile that exist: the rest are zeros
};

struct Segment { // neighbours in the image that are neighbours in the packed inputs
  std::int64_t offset;
  int column, length;
};

struct Depthwise {
  const float* image;     // at the first of `lanes` channels
  const float* gradients; // (positions, gradient_stride), likewise
  std::int64_t gradient_stride;
  const std::int64_t* taps; // offsets in the image
  int count;                // of taps
  float* squares;           // (count, lanes), added to
  float* sums;              // likewise, or null
};

// x = (a - mean) * inverse_deviation; null stands for 0 and 1. Strides in elements, 0 to repeat.
struct Statistic {
  const float* data;
  std::int64_t step_stride, channel_stride;
};

struct Affine {
  Matrix activations, gradients; // rows are steps, columns are channels
  Statistic mean, inverse_deviation;
  std::int64_t steps;
  int channels;
  float* products; // (channels): sum over steps of g x, written
  float* sums;     // (channels): sum over steps of g, written
};

constexpr int kAffineChannels = 64; // at most, in one call

struct FisherKernels {
  int lanes;   // floats in a vector
  int outputs; // at most, in a tile
  // Writes rows of `width` floats; those from `columns` on are zeros.
  void (*pack)(const Matrix&, std::int64_t rows, int columns, int width, float* out);
  // Of rows of `width` floats that lie together: writes `width` sums, rounded up to a vector.
  void (*column_sums)(const float* rows, std::int64_t count, int width, float* sums);
  void (*gather)(const float* image, const Positions&, const Segment*, int count, int width,
                 float* out);
  void (*tile)(const Tile&);
  void (*depthwise)(const Depthwise&, const Positions&);
  void (*affine)(const Affine&);
};

const FisherKernels& fisher_kernels_baseline();
const FisherKernels& fisher_kernels_avx2();
const FisherKernels& fisher_kernels_avx512();

} // namespace bdu::cpu
