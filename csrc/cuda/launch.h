// What a launch is told, and the launches: on a device (kernels.cu) and, for the tests of machines
// without one, on the host (on_host.cpp). All pointers are of the device that runs it.
#pragma once

#include <cstdint>

#include "warp_tile.h"

namespace bdu::cuda {

struct Launch {
  Table table;
  std::int64_t tiles;
  Stored stored;
  void* partials;   // one a tile: float, of grad_norm double
  float* result;    // the penalty or the norm
  unsigned* ticket; // 0; left so
  int device;       // ordinal; negative: the host
  std::uintptr_t stream;
};

struct SgdStep {
  SgdScalars scalars;
  OnDevice on_device;
  Pull pull;
  bool has_momentum;
  Flags flags;
};

struct AdamwStep {
  AdamwScalars scalars;
  AdamwLogs logs;
  const float* steps; // t of each tensor, already counted up
  OnDevice on_device;
  Pull pull;
  Flags flags;
};

// One launch each, in stream order, without waiting.
// Throw std::runtime_error where CUDA refuses one.
void ewc_sgd_step(const Launch&, const SgdStep&);
void ewc_adamw_step(const Launch&, const AdamwStep&);
void grad_norm(const Launch&, int column);

namespace on_host {
void ewc_sgd_step(const Launch&, const SgdStep&);
void ewc_adamw_step(const Launch&, const AdamwStep&);
void grad_norm(const Launch&, int column);
} // namespace on_host

} // namespace bdu::cuda
