// The device's code on the host: every lane of every tile in turn, and the sums in its order.
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "launch.h"

namespace bdu::cuda::on_host {
namespace {

// As the butterfly of shuffles and the tree in shared memory add: lane 0's result.
template <class T>
T tree_sum(std::vector<T> value) {
  for (std::size_t half = value.size() / 2; half > 0; half /= 2)
    for (std::size_t i = 0; i < half; ++i) value[i] += value[i + half];
  return value[0];
}

template <class T, class Lane>
double run(const Launch& launch, const Lane& lane_of) {
  auto* partials = static_cast<T*>(launch.partials);
  for (std::int64_t tile = 0; tile < launch.tiles; ++tile) {
    std::vector<T> lanes(kLanes);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane_of(tile, lane);
    partials[tile] = tree_sum(lanes);
  }
  std::vector<double> threads(kThreads);
  for (int thread = 0; thread < kThreads; ++thread)
    threads[thread] = partial_sum(partials, launch.tiles, thread);
  return tree_sum(threads);
}

} // namespace

void ewc_sgd_step(const Launch& launch, const SgdStep& step) {
  SgdScalars s = step.scalars;
  step.on_device.apply(s.pull);
  with_stored(launch.stored, [&](auto stored) {
    with_pull(step.pull, [&](auto pull) {
      with_switch(step.has_momentum, [&](auto has_momentum) {
        const double sum = run<float>(launch, [&](std::int64_t tile, int lane) {
          return ewc_sgd_lane<stored, pull, has_momentum>(launch.table, tile, lane, s, step.flags,
                                                          step.on_device.is_skipped());
        });
        *launch.result = static_cast<float>(0.5 * s.pull.ewc_lambda * sum);
      });
    });
  });
}

void ewc_adamw_step(const Launch& launch, const AdamwStep& step) {
  AdamwScalars s = step.scalars;
  step.on_device.apply(s.pull);
  with_stored(launch.stored, [&](auto stored) {
    with_pull(step.pull, [&](auto pull) {
      const double sum = run<float>(launch, [&](std::int64_t tile, int lane) {
        return ewc_adamw_lane<stored, pull>(launch.table, tile, lane, s, step.logs, step.steps,
                                            step.flags, step.on_device.is_skipped());
      });
      *launch.result = static_cast<float>(0.5 * s.pull.ewc_lambda * sum);
    });
  });
}

void grad_norm(const Launch& launch, int column) {
  with_stored(launch.stored, [&](auto stored) {
    const double sum = run<double>(launch, [&](std::int64_t tile, int lane) {
      return square_sum_lane<stored>(launch.table, tile, lane, column);
    });
    *launch.result = static_cast<float>(std::sqrt(sum));
  });
}

} // namespace bdu::cuda::on_host
