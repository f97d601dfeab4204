// One chunk of one tensor. Compiled once per instruction set, see chunk_kernels.cpp.
#pragma once

#include <cstdint>

#include "../table.h"

namespace bdu::cpu {

// The sums of a chunk are added in a fixed order, so this number is part of the result's bits.
constexpr std::int64_t kChunk = 16384;

struct View { // elements [0, n) of one column; data is null where the tensor has none
  void* data;
  Dtype dtype;
  const std::uint16_t* scale; // of a Fisher in 8 bits, one a block
};

struct SgdChunk {
  std::int64_t n, first_element;
  View param, grad, momentum_buffer, fisher, anchor;
};

struct AdamwChunk {
  std::int64_t n, first_element;
  View param, grad, exp_avg, exp_avg_sq, fisher, anchor;
};

// Benchmark floor: as many streams as a step has, in 32-bit words. Momentum SGD reads three columns
// (gradient, Fisher, anchor) and reads and writes two; AdamW writes a third, else null.
struct Streams {
  const std::uint32_t* read[3];
  std::uint32_t* written[3];
};

// Steps return the chunk's sum of F d^2, at theta before the step.
struct ChunkKernels {
  const char* isa;
  double (*ewc_sgd)(const SgdChunk&, const SgdScalars&, const Switches&);
  double (*ewc_adamw)(const AdamwChunk&, const AdamwScalars&, const Switches&);
  double (*square_sum)(const View&, std::int64_t n);
  void (*stream)(const Streams&, std::int64_t offset, std::int64_t n);
};

const ChunkKernels& chunk_kernels_baseline();
const ChunkKernels& chunk_kernels_avx2();
const ChunkKernels& chunk_kernels_avx512();

} // namespace bdu::cpu
