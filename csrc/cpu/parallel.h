// Whole operations on the CPU: every (tensor, chunk) pair of a group in one parallel loop.
#pragma once

#include <cstdint>

#include "../table.h"

namespace bdu::cpu {

const char* instruction_set(); // the one the kernels were chosen for at run time

// Both return sum F d^2 over the table; the same bits whatever the number of threads.
double ewc_sgd_step(const SgdTable& table, const SgdScalars& scalars, const Switches& switches,
                    int threads);
double ewc_adamw_step(const AdamwTable& table, const AdamwScalars& scalars,
                      const AdamwSettings& settings, const Switches& switches, int threads);

double grad_norm(std::int64_t tensors, const std::int64_t* numel, const Column& grad, int threads);

// Benchmark floor: moves the bytes of a step and computes nothing. See Streams in chunk_kernels.h.
void memory_stream(const std::int64_t* read, const std::int64_t* written, int count_written,
                   std::int64_t words, int threads);

} // namespace bdu::cpu
