// The exact Fisher of whole layers on the CPU; bdu/reference.py has the formulas. The same bits
// whatever the number of threads: each entry is added up by one thread, in the order of samples.
#pragma once

#include <cstdint>

#include "../table.h"

namespace bdu::cpu {

// (samples, steps, channels), strides in elements.
struct Activity {
  const void* data;
  Dtype dtype;
  std::int64_t sample_stride, step_stride, channel_stride;
};

// Rows of a sample's gradient that another use of the weight adds to, so they are not squared here.
struct Kept {
  float* rows;               // (any, inputs), dense, added to; null: none
  const std::int32_t* index; // (samples, outputs), dense; negative: squared
};

// What is added to: dense float32; null where it is not wanted.
struct Totals {
  float *weight, *bias;                   // squares
  float *weight_gradient, *bias_gradient; // without the square
};

struct Linear {
  std::int64_t samples, steps, inputs, outputs;
  Activity activations, gradients;
  Kept kept;
  Totals totals; // (outputs, inputs) and (outputs)
};

void fisher_linear(const Linear& layer, int threads);

// Planes of one axis have height 1, kernel height 1, and so on.
struct Convolution {
  std::int64_t samples, inputs, outputs, groups;
  std::int64_t height, width, out_height, out_width;
  std::int64_t kernel_height, kernel_width;
  std::int64_t stride[2], padding[2], dilation[2];
  const void* activations;
  Dtype activations_dtype;
  std::int64_t activations_stride[4]; // sample, channel, row, column
  Activity gradients;                 // a step is a position
  Totals totals;                      // (outputs, inputs / groups, kernel) and (outputs)
  std::int64_t total_stride[4];       // of a weight's, in any order
};

void fisher_conv(const Convolution& layer, int threads);

// Tokens sorted by (index, sample): segments have one of each, rows (distinct indices) have one
// index.
struct Embedding {
  std::int64_t rows, width, steps;
  const std::int64_t* token;         // positions in (samples * steps), sorted
  const std::int64_t* segment_begin; // in `token`; one more than there are segments
  const std::int64_t* row_begin;     // in `segment_begin`; one more than there are rows
  const std::int64_t* row_index;     // in the table
  Activity gradients;
  float* total; // (all rows, width), dense
  float* weight_gradient;
};

void fisher_embedding(const Embedding& layer, int threads);

struct Scaled {
  std::int64_t samples, steps, channels;
  Activity activations, gradients; // activations.data is null where only the bias is wanted
  const float *mean, *inverse_deviation;
  std::int64_t mean_stride[3], inverse_deviation_stride[3]; // sample, step, channel; 0 repeats
  Totals totals;                                            // (channels)
};

void fisher_affine(const Scaled& layer, int threads);

} // namespace bdu::cpu
