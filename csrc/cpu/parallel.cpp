#include "parallel.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "chunk_kernels.h"
#include "isa.h"

namespace bdu::cpu {
namespace {

const ChunkKernels& choose_kernels() {
#if defined(BDU_X86)
  if (best_isa() == Isa::avx512) return chunk_kernels_avx512();
  if (best_isa() == Isa::avx2) return chunk_kernels_avx2();
#endif
  return chunk_kernels_baseline();
}

const ChunkKernels& kernels() {
  static const ChunkKernels& chosen = choose_kernels();
  return chosen;
}

struct Chunk {
  std::int64_t tensor, offset, n;
};

// Flattens (tensor, chunk) into one index, so that ten thousand small tensors and one huge one
// keep all threads equally busy.
class Chunks {
 public:
  Chunks(std::int64_t tensors, const std::int64_t* numel) : numel_(numel), first_(tensors + 1) {
    for (std::int64_t t = 0; t < tensors; ++t)
      first_[t + 1] = first_[t] + (numel[t] + kChunk - 1) / kChunk;
  }

  std::int64_t count() const { return first_.back(); }

  Chunk at(std::int64_t index) const {
    const std::int64_t t =
        std::upper_bound(first_.begin(), first_.end(), index) - first_.begin() - 1;
    const std::int64_t offset = (index - first_[t]) * kChunk;
    return {t, offset, std::min(kChunk, numel_[t] - offset)};
  }

 private:
  const std::int64_t* numel_;
  std::vector<std::int64_t> first_;
};

View view_of(const Column& column, const Chunk& chunk, const Column* scale = nullptr) {
  const auto dtype = static_cast<Dtype>(column.dtype[chunk.tensor]);
  const std::int64_t address = column.address[chunk.tensor];
  if (address == 0) return {nullptr, dtype, nullptr};
  const std::int64_t scales = scale == nullptr ? 0 : scale->address[chunk.tensor];
  return {reinterpret_cast<void*>(address + chunk.offset * bytes_of(dtype)), dtype,
          reinterpret_cast<const std::uint16_t*>(scales) + chunk.offset / kScaleBlock};
}

// Calls f(chunk) for every chunk and adds what it returns in the order of the chunks. Runs of
// neighbouring chunks go to a thread together; which thread gets them does not matter.
template <class F>
double sum_over_chunks(const Chunks& chunks, int threads, const F& f) {
  const std::int64_t count = chunks.count();
  std::vector<double> partial(count);
  const std::int64_t run = std::max<std::int64_t>(1, count / (std::int64_t{threads} * 16));
  (void)run, (void)threads; // unused where OpenMP is absent
#pragma omp parallel for num_threads(threads) schedule(dynamic, run) if (threads > 1 && count > 1)
  for (std::int64_t i = 0; i < count; ++i) partial[i] = f(chunks.at(i));
  double sum = 0.0;
  for (double value : partial) sum += value;
  return sum;
}

// A tensor without Fisher or anchor is stepped without pull and adds no penalty.
Switches switches_of(const Switches& on, const View& fisher, const View& anchor) {
  Switches own = on;
  if (fisher.data == nullptr || anchor.data == nullptr) own.pull = Pull::none;
  if (fisher.data == nullptr) own.update_fisher = false;
  return own;
}

} // namespace

const char* instruction_set() { return kernels().isa; }

double ewc_sgd_step(const SgdTable& table, const SgdScalars& scalars, const Switches& switches,
                    int threads) {
  const ChunkKernels& k = kernels();
  const Chunks chunks(table.tensors, table.numel);
  return sum_over_chunks(chunks, threads, [&](const Chunk& c) {
    const SgdChunk chunk{c.n,
                         table.first_element[c.tensor] + c.offset,
                         view_of(table.param, c),
                         view_of(table.grad, c),
                         view_of(table.momentum_buffer, c),
                         view_of(table.fisher, c, &table.fisher_scale),
                         view_of(table.anchor, c)};
    return k.ewc_sgd(chunk, scalars, switches_of(switches, chunk.fisher, chunk.anchor));
  });
}

double ewc_adamw_step(const AdamwTable& table, const AdamwScalars& scalars,
                      const AdamwSettings& settings, const Switches& switches, int threads) {
  const ChunkKernels& k = kernels();
  const Chunks chunks(table.tensors, table.numel);
  // Tensors mostly share one step count, and pow() is dear for ten thousand small ones.
  std::vector<AdamwScalars> own(table.tensors, scalars);
  float known_step = -1.0f;
  float step_size = 0.0f, inverse_sqrt = 0.0f;
  for (std::int64_t t = 0; t < table.tensors; ++t) {
    if (table.step[t] != known_step) {
      known_step = table.step[t];
      const double correction1 = 1.0 - std::pow(settings.beta1, double{known_step});
      const double correction2 = 1.0 - std::pow(settings.beta2, double{known_step});
      step_size = static_cast<float>(settings.lr / correction1);
      inverse_sqrt = static_cast<float>(1.0 / std::sqrt(correction2));
    }
    own[t].step_size = step_size;
    own[t].inverse_sqrt_bias_correction2 = inverse_sqrt;
  }
  return sum_over_chunks(chunks, threads, [&](const Chunk& c) {
    const AdamwChunk chunk{c.n,
                           table.first_element[c.tensor] + c.offset,
                           view_of(table.param, c),
                           view_of(table.grad, c),
                           view_of(table.exp_avg, c),
                           view_of(table.exp_avg_sq, c),
                           view_of(table.fisher, c, &table.fisher_scale),
                           view_of(table.anchor, c)};
    return k.ewc_adamw(chunk, own[c.tensor], switches_of(switches, chunk.fisher, chunk.anchor));
  });
}

double grad_norm(std::int64_t tensors, const std::int64_t* numel, const Column& grad, int threads) {
  const ChunkKernels& k = kernels();
  const Chunks chunks(tensors, numel);
  return std::sqrt(sum_over_chunks(
      chunks, threads, [&](const Chunk& c) { return k.square_sum(view_of(grad, c), c.n); }));
}

void memory_stream(const std::int64_t* read, const std::int64_t* written, int count_written,
                   std::int64_t words, int threads) {
  const ChunkKernels& k = kernels();
  Streams streams{};
  for (int i = 0; i < 3; ++i) streams.read[i] = reinterpret_cast<const std::uint32_t*>(read[i]);
  for (int i = 0; i < count_written; ++i)
    streams.written[i] = reinterpret_cast<std::uint32_t*>(written[i]);
  sum_over_chunks(Chunks(1, &words), threads, [&](const Chunk& c) {
    k.stream(streams, c.offset, c.n);
    return 0.0;
  });
}

} // namespace bdu::cpu
