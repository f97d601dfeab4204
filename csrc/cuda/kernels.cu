// The kernels: a persistent grid whose warps walk over the tiles; the block that finishes last
// adds the tiles' sums. No atomics on data, so the same bits on every run and any device.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "launch.h"

namespace bdu::cuda {
namespace {

constexpr int kWarps = kThreads / kLanes;
// At least as many blocks fit on a multiprocessor: the registers are shared out accordingly. The
// mix of dtypes takes what it needs.
template <Stored stored>
constexpr int kBlocks = stored == Stored::mixed ? 1 : 2;

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class T>
__device__ T warp_sum(T value) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// True in all threads of the block that arrives last; what the others wrote is visible to it.
__device__ bool is_last_block(unsigned* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  // Wraps around to 0, which leaves the ticket ready for the next launch.
  if (threadIdx.x == 0) last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  return last;
}

// The sum of all tiles' sums, in thread 0.
template <class T>
__device__ double block_sum(const T* partials, std::int64_t tiles) {
  __shared__ double sum[kThreads];
  __threadfence();
  sum[threadIdx.x] = partial_sum(partials, tiles, static_cast<int>(threadIdx.x));
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sum[threadIdx.x] += sum[threadIdx.x + half];
  }
  return sum[0];
}

// Calls lane_of(tile, lane) for the tiles of this warp and keeps their sums.
template <class T, class Lane>
__device__ void walk(T* partials, std::int64_t tiles, const Lane& lane_of) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  for (std::int64_t tile = std::int64_t{blockIdx.x} * kWarps + warp; tile < tiles;
       tile += std::int64_t{gridDim.x} * kWarps) {
    const T sum = warp_sum<T>(lane_of(tile, lane));
    if (lane == 0) partials[tile] = sum;
  }
}

template <Stored stored, Pull pull, bool has_momentum>
__global__ void __launch_bounds__(kThreads, kBlocks<stored>)
    ewc_sgd_kernel(Launch launch, SgdStep step) {
  SgdScalars s = step.scalars;
  step.on_device.apply(s.pull);
  const bool is_skipped = step.on_device.is_skipped();
  auto* partials = static_cast<float*>(launch.partials);
  walk(partials, launch.tiles, [&](std::int64_t tile, int lane) {
    return ewc_sgd_lane<stored, pull, has_momentum>(launch.table, tile, lane, s, step.flags,
                                                    is_skipped);
  });
  if (pull == Pull::none || !is_last_block(launch.ticket)) return;
  const double sum = block_sum(partials, launch.tiles);
  if (threadIdx.x == 0) *launch.result = static_cast<float>(0.5 * s.pull.ewc_lambda * sum);
}

template <Stored stored, Pull pull>
__global__ void __launch_bounds__(kThreads, kBlocks<stored>)
    ewc_adamw_kernel(Launch launch, AdamwStep step) {
  AdamwScalars s = step.scalars;
  step.on_device.apply(s.pull);
  const bool is_skipped = step.on_device.is_skipped();
  auto* partials = static_cast<float*>(launch.partials);
  walk(partials, launch.tiles, [&](std::int64_t tile, int lane) {
    return ewc_adamw_lane<stored, pull>(launch.table, tile, lane, s, step.logs, step.steps,
                                        step.flags, is_skipped);
  });
  if (pull == Pull::none || !is_last_block(launch.ticket)) return;
  const double sum = block_sum(partials, launch.tiles);
  if (threadIdx.x == 0) *launch.result = static_cast<float>(0.5 * s.pull.ewc_lambda * sum);
}

template <Stored stored>
__global__ void __launch_bounds__(kThreads, kBlocks<stored>)
    grad_norm_kernel(Launch launch, int column) {
  auto* partials = static_cast<double*>(launch.partials);
  walk(partials, launch.tiles, [&](std::int64_t tile, int lane) {
    return square_sum_lane<stored>(launch.table, tile, lane, column);
  });
  if (!is_last_block(launch.ticket)) return;
  const double sum = block_sum(partials, launch.tiles);
  if (threadIdx.x == 0) *launch.result = static_cast<float>(sqrt(sum));
}

// The launch's device while it lives; torch may have another one current.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Launch& launch) : device_(launch.device) {
    check(cudaGetDevice(&before_));
    if (before_ != device_) check(cudaSetDevice(device_));
  }
  ~OnDeviceOf() {
    if (before_ != device_) cudaSetDevice(before_);
  }

 private:
  int device_, before_ = 0;
};

// As many blocks as the device holds at once; asking takes longer than a launch.
template <auto kernel>
int resident_blocks(int device) {
  static std::mutex guard;
  static std::map<int, int> known;
  const std::lock_guard<std::mutex> lock(guard);
  int& blocks = known[device];
  if (blocks == 0) {
    int processors = 0, resident = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0));
    blocks = processors * resident;
  }
  return blocks;
}

template <auto kernel, class... Arguments>
void start(const Launch& launch, const Arguments&... arguments) {
  const OnDeviceOf device(launch);
  const std::int64_t wanted = (launch.tiles + kWarps - 1) / kWarps;
  const auto grid =
      static_cast<unsigned>(std::min<std::int64_t>(wanted, resident_blocks<kernel>(launch.device)));
  const auto stream = reinterpret_cast<cudaStream_t>(launch.stream);
  kernel<<<grid, kThreads, 0, stream>>>(launch, arguments...);
  check(cudaGetLastError());
}

} // namespace

void ewc_sgd_step(const Launch& launch, const SgdStep& step) {
  with_stored(launch.stored, [&](auto stored) {
    with_pull(step.pull, [&](auto pull) {
      with_switch(step.has_momentum, [&](auto has_momentum) {
        start<ewc_sgd_kernel<stored, pull, has_momentum>>(launch, step);
      });
    });
  });
}

void ewc_adamw_step(const Launch& launch, const AdamwStep& step) {
  with_stored(launch.stored, [&](auto stored) {
    with_pull(step.pull, [&](auto pull) { start<ewc_adamw_kernel<stored, pull>>(launch, step); });
  });
}

void grad_norm(const Launch& launch, int column) {
  with_stored(launch.stored, [&](auto stored) { start<grad_norm_kernel<stored>>(launch, column); });
}

} // namespace bdu::cuda
