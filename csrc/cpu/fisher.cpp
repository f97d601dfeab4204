#include "fisher.h"

#include <algorithm>
#include <memory>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "fisher_kernels.h"
#include "isa.h"

namespace bdu::cpu {
namespace {

// Steps of a block: its packed activations, 128 bytes a step, stay in the second cache while the
// tiles of all outputs pass.
constexpr std::int64_t kBlockSteps = 1024;
// Of the packed gradients, in floats: they are read once for every tile of inputs.
constexpr std::int64_t kPackedGradients = 2 << 20;

const FisherKernels& choose_kernels() {
#if defined(BDU_X86)
  if (best_isa() == Isa::avx512) return fisher_kernels_avx512();
  if (best_isa() == Isa::avx2) return fisher_kernels_avx2();
#endif
  return fisher_kernels_baseline();
}

const FisherKernels& kernels() {
  static const FisherKernels& chosen = choose_kernels();
  return chosen;
}

std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Not initialised, unlike a vector.
class Floats {
 public:
  float* at_least(std::int64_t count) {
    if (count > size_) {
      data_.reset(new float[count]);
      size_ = count;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<float[]> data_;
  std::int64_t size_ = 0;
};

const char* at(const void* data, Dtype dtype, std::int64_t elements) {
  return static_cast<const char*>(data) + elements * bytes_of(dtype);
}

// `count` things cut into pieces of at most `most`, as alike as can be.
class Pieces {
 public:
  Pieces(std::int64_t count, std::int64_t most) : count_(count), pieces_(divided_up(count, most)) {}

  std::int64_t pieces() const { return pieces_; }
  std::int64_t begin(std::int64_t piece) const { return piece * count_ / pieces_; }
  std::int64_t size(std::int64_t piece) const { return begin(piece + 1) - begin(piece); }

 private:
  std::int64_t count_, pieces_;
};

// A layer as the tiles see it: for each group, products of its outputs' gradients and its inputs.
struct Product {
  std::int64_t samples, steps, groups, inputs, outputs; // the last two of one group
  Activity gradients;
  Kept kept;
  float *total, *weight_gradient;
  std::int64_t output_stride;       // of both
  const std::int64_t* input_offset; // (inputs), of both; null: the input's own number
};

// Adds the squared gradients of all samples to the total.
//   begin(first, count): a block of samples is next; called by one thread.
//   pack(group, first_input, inputs, width, first, count, out): writes these samples' activations.
template <class Begin, class Pack>
void add_squares(const Product& layer, int threads, const Begin& begin, const Pack& pack) {
  if (layer.samples == 0 || layer.steps == 0 || layer.inputs == 0 || layer.outputs == 0) return;
  const FisherKernels& k = kernels();
  const std::int64_t steps = layer.steps;
  const std::int64_t block = std::clamp<std::int64_t>(kBlockSteps / steps, 1, layer.samples);
  const Pieces blocks(layer.samples, block);
  const std::int64_t block_steps = divided_up(layer.samples, blocks.pieces()) * steps;
  const Pieces panels(divided_up(layer.inputs, k.lanes), kTileVectors);
  const Pieces tiles(layer.outputs, k.outputs);

  // Outputs come in parts whose packed gradients are small; with groups, a part is some groups.
  const std::int64_t of_group = layer.outputs * block_steps;
  const std::int64_t group_part =
      std::clamp<std::int64_t>(kPackedGradients / of_group, 1, layer.groups);
  const std::int64_t tile_part = std::clamp<std::int64_t>(
      kPackedGradients / (group_part * block_steps * k.outputs), 1, tiles.pieces());
  const Pieces group_parts(layer.groups, group_part), tile_parts(tiles.pieces(), tile_part);

  Floats packed;
  std::vector<Floats> panel(threads);
  for (std::int64_t b = 0; b < blocks.pieces(); ++b) {
    const std::int64_t first = blocks.begin(b), count = blocks.size(b);
    begin(first, count);
    for (std::int64_t gp = 0; gp < group_parts.pieces(); ++gp)
      for (std::int64_t tp = 0; tp < tile_parts.pieces(); ++tp) {
        const std::int64_t first_group = group_parts.begin(gp), groups = group_parts.size(gp);
        const std::int64_t first_tile = tile_parts.begin(tp), own_tiles = tile_parts.size(tp);
        const std::int64_t first_output = tiles.begin(first_tile);
        const std::int64_t outputs = tiles.begin(first_tile + own_tiles) - first_output;
        float* gradients = packed.at_least(groups * outputs * count * steps);

        // (group, tile) → its gradients, all samples and steps of a tile together
        const auto gradients_of = [&](std::int64_t group, std::int64_t tile) {
          const std::int64_t before = tiles.begin(first_tile + tile) - first_output;
          return gradients + (group * outputs + before) * count * steps;
        };
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (threads > 1)
        for (std::int64_t group = 0; group < groups; ++group)
          for (std::int64_t tile = 0; tile < own_tiles; ++tile) {
            const auto width = static_cast<int>(tiles.size(first_tile + tile));
            const Activity& g = layer.gradients;
            const std::int64_t channel =
                (first_group + group) * layer.outputs + tiles.begin(first_tile + tile);
            float* to = gradients_of(group, tile);
            for (std::int64_t sample = 0; sample < count; ++sample, to += steps * width)
              k.pack({at(g.data, g.dtype,
                         (first + sample) * g.sample_stride + channel * g.channel_stride),
                      g.dtype, g.step_stride, g.channel_stride},
                     steps, width, width, to);
          }

        // A task is a panel of inputs and a run of tiles; runs only where panels are few.
        const std::int64_t all_panels = groups * panels.pieces();
        const std::int64_t wanted = threads > 1 ? 4 * threads : 1;
        const std::int64_t run =
            std::max<std::int64_t>(1, own_tiles / divided_up(wanted, all_panels));
        const Pieces runs(own_tiles, run);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
        for (std::int64_t task = 0; task < all_panels * runs.pieces(); ++task) {
          const std::int64_t at_panel = task / runs.pieces() % panels.pieces();
          const std::int64_t group = task / runs.pieces() / panels.pieces();
          const auto vectors = static_cast<int>(panels.size(at_panel));
          const int width = vectors * k.lanes;
          const std::int64_t first_input = panels.begin(at_panel) * k.lanes;
          const auto inputs =
              static_cast<int>(std::min<std::int64_t>(width, layer.inputs - first_input));
#if defined(_OPENMP)
          float* activations = panel[omp_get_thread_num()].at_least(count * steps * width);
#else
          float* activations = panel[0].at_least(count * steps * width);
#endif
          pack(first_group + group, first_input, inputs, width, first, count, activations);
          const std::int64_t at_run = task % runs.pieces();
          for (std::int64_t t = runs.begin(at_run); t < runs.begin(at_run) + runs.size(at_run);
               ++t) {
            alignas(64) float squares[kMostOutputs * kTileVectors * kMostLanes] = {};
            alignas(64) float sums[kMostOutputs * kTileVectors * kMostLanes] = {};
            Tile tile{};
            tile.outputs = static_cast<int>(tiles.size(first_tile + t));
            tile.vectors = vectors;
            tile.samples = count;
            tile.steps = steps;
            tile.activations = activations;
            tile.gradients = gradients_of(group, t);
            tile.squares = squares;
            tile.sums = layer.weight_gradient == nullptr ? nullptr : sums;
            const std::int64_t output =
                (first_group + group) * layer.outputs + tiles.begin(first_tile + t);
            if (layer.kept.rows != nullptr) {
              tile.kept = layer.kept.rows + first_input;
              tile.kept_index = layer.kept.index + first * layer.outputs + output;
              tile.kept_stride = layer.inputs;
              tile.kept_index_stride = layer.outputs;
              tile.inputs = inputs;
            }
            k.tile(tile);
            const auto add = [&](const float* from, float* to) {
              for (int o = 0; o < tile.outputs; ++o) {
                float* row = to + (output + o) * layer.output_stride;
                const float* own = from + o * width;
                if (layer.input_offset == nullptr)
                  for (int i = 0; i < inputs; ++i) row[first_input + i] += own[i];
                else
                  for (int i = 0; i < inputs; ++i)
                    row[layer.input_offset[first_input + i]] += own[i];
              }
            };
            add(squares, layer.total);
            if (layer.weight_gradient != nullptr) add(sums, layer.weight_gradient);
          }
        }
      }
  }
}

// Samples of a block as images with the channels last and their padding around them.
class Images {
 public:
  Images(const Convolution& layer, int threads)
      : layer_(layer),
        threads_(threads),
        height_(layer.height + 2 * layer.padding[0]),
        width_(layer.width + 2 * layer.padding[1]),
        channels_(divided_up(layer.inputs, kMostLanes) * kMostLanes) {
    if (layer.inputs < kMostLanes) channels_ = layer.inputs;
  }

  std::int64_t row_stride() const { return width_ * channels_; }
  std::int64_t channels() const { return channels_; }
  const float* image(std::int64_t sample) const {
    return data_ + (sample - first_) * height_ * row_stride();
  }
  Positions positions() const {
    return {layer_.out_height, layer_.out_width, layer_.stride[0] * row_stride(),
            layer_.stride[1] * channels_};
  }
  std::int64_t offset(std::int64_t tap) const {
    return tap / layer_.kernel_width * layer_.dilation[0] * row_stride() +
           tap % layer_.kernel_width * layer_.dilation[1] * channels_;
  }

  void fill(std::int64_t first, std::int64_t count) {
    first_ = first;
    // the last vector of the last image may be read past its end
    data_ = buffer_.at_least(count * height_ * row_stride() + kMostLanes);
    const Convolution& c = layer_;
    const std::int64_t above = c.padding[0], beside = c.padding[1] * channels_;
#pragma omp parallel for num_threads(threads_) schedule(static) if (threads_ > 1)
    for (std::int64_t row = 0; row < count * height_; ++row) {
      const std::int64_t sample = row / height_, y = row % height_ - above;
      float* out = data_ + row * row_stride();
      if (y < 0 || y >= c.height) {
        std::fill_n(out, row_stride(), 0.0f);
        continue;
      }
      std::fill_n(out, beside, 0.0f);
      std::fill_n(out + row_stride() - beside, beside, 0.0f);
      kernels().pack({at(c.activations, c.activations_dtype,
                         (first + sample) * c.activations_stride[0] + y * c.activations_stride[2]),
                      c.activations_dtype, c.activations_stride[3], c.activations_stride[1]},
                     c.width, static_cast<int>(c.inputs), static_cast<int>(channels_),
                     out + beside);
    }
  }

 private:
  const Convolution& layer_;
  int threads_;
  std::int64_t height_, width_, channels_, first_ = 0;
  Floats buffer_;
  float* data_ = nullptr;
};

// Where in the total the input (tap, channel) of a group stands; taps come first.
std::vector<std::int64_t> offsets_in_total(const Convolution& c) {
  std::vector<std::int64_t> offsets;
  for (std::int64_t y = 0; y < c.kernel_height; ++y)
    for (std::int64_t x = 0; x < c.kernel_width; ++x)
      for (std::int64_t channel = 0; channel < c.inputs / c.groups; ++channel)
        offsets.push_back(channel * c.total_stride[1] + y * c.total_stride[2] +
                          x * c.total_stride[3]);
  return offsets;
}

void fisher_depthwise(const Convolution& c, int threads) {
  const FisherKernels& k = kernels();
  const std::int64_t taps = c.kernel_height * c.kernel_width;
  const std::int64_t steps = c.out_height * c.out_width, copies = c.outputs / c.inputs;
  Images images(c, threads);
  const std::int64_t block = std::clamp<std::int64_t>(
      kBlockSteps / std::max<std::int64_t>(1, steps), 1, std::max<std::int64_t>(1, c.samples));
  const std::int64_t vectors = divided_up(c.inputs, k.lanes);
  std::vector<std::int64_t> offset(taps);
  for (std::int64_t tap = 0; tap < taps; ++tap) offset[tap] = images.offset(tap);
  for (std::int64_t first = 0; first < c.samples; first += block) {
    const std::int64_t count = std::min(block, c.samples - first);
    images.fill(first, count);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::vector<float> gradients(steps * k.lanes), squares(taps * k.lanes), sums(taps * k.lanes);
#pragma omp for collapse(2) schedule(dynamic, 1)
      for (std::int64_t vector = 0; vector < vectors; ++vector)
        for (std::int64_t copy = 0; copy < copies; ++copy) {
          const std::int64_t channel = vector * k.lanes;
          const auto lanes = static_cast<int>(std::min<std::int64_t>(k.lanes, c.inputs - channel));
          std::fill(squares.begin(), squares.end(), 0.0f);
          std::fill(sums.begin(), sums.end(), 0.0f);
          for (std::int64_t sample = 0; sample < count; ++sample) {
            const Activity& g = c.gradients;
            k.pack({at(g.data, g.dtype,
                       (first + sample) * g.sample_stride +
                           (channel * copies + copy) * g.channel_stride),
                    g.dtype, g.step_stride, copies * g.channel_stride},
                   steps, lanes, k.lanes, gradients.data());
            k.depthwise({images.image(first + sample) + channel, gradients.data(), k.lanes,
                         offset.data(), static_cast<int>(taps), squares.data(),
                         c.weight_gradient == nullptr ? nullptr : sums.data()},
                        images.positions());
          }
          for (std::int64_t tap = 0; tap < taps; ++tap)
            for (int lane = 0; lane < lanes; ++lane) {
              const std::int64_t place = ((channel + lane) * copies + copy) * c.total_stride[0] +
                                         tap / c.kernel_width * c.total_stride[2] +
                                         tap % c.kernel_width * c.total_stride[3];
              c.total[place] += squares[tap * k.lanes + lane];
              if (c.weight_gradient != nullptr)
                c.weight_gradient[place] += sums[tap * k.lanes + lane];
            }
        }
    }
  }
}

} // namespace

void fisher_linear(const Linear& layer, int threads) {
  Product product{};
  product.samples = layer.samples;
  product.steps = layer.steps;
  product.groups = 1;
  product.inputs = layer.inputs;
  product.outputs = layer.outputs;
  product.gradients = layer.gradients;
  product.kept = layer.kept;
  product.total = layer.total;
  product.weight_gradient = layer.weight_gradient;
  product.output_stride = layer.inputs;
  const Activity& a = layer.activations;
  add_squares(
      product, threads, [](std::int64_t, std::int64_t) {},
      [&](std::int64_t, std::int64_t first_input, int inputs, int width, std::int64_t first,
          std::int64_t count, float* out) {
        for (std::int64_t sample = first; sample < first + count; ++sample)
          kernels().pack(
              {at(a.data, a.dtype, sample * a.sample_stride + first_input * a.channel_stride),
               a.dtype, a.step_stride, a.channel_stride},
              layer.steps, inputs, width, out + (sample - first) * layer.steps * width);
      });
}

void fisher_conv(const Convolution& layer, int threads) {
  if (layer.groups == layer.inputs && layer.groups > 1) return fisher_depthwise(layer, threads);
  const std::int64_t channels = layer.inputs / layer.groups;
  const std::int64_t taps = layer.kernel_height * layer.kernel_width;
  const std::vector<std::int64_t> offsets = offsets_in_total(layer);
  Product product{};
  product.samples = layer.samples;
  product.steps = layer.out_height * layer.out_width;
  product.groups = layer.groups;
  product.inputs = taps * channels;
  product.outputs = layer.outputs / layer.groups;
  product.gradients = layer.gradients;
  product.total = layer.total;
  product.weight_gradient = layer.weight_gradient;
  product.output_stride = layer.total_stride[0];
  product.input_offset = offsets.data();
  Images images(layer, threads);
  add_squares(
      product, threads, [&](std::int64_t first, std::int64_t count) { images.fill(first, count); },
      [&](std::int64_t group, std::int64_t first_input, int inputs, int width, std::int64_t first,
          std::int64_t count, float* out) {
        std::vector<Segment> segments;
        for (int column = 0; column < inputs;) {
          const std::int64_t tap = (first_input + column) / channels;
          const std::int64_t channel = (first_input + column) % channels;
          const auto length =
              static_cast<int>(std::min<std::int64_t>(channels - channel, inputs - column));
          const std::int64_t offset = images.offset(tap) + group * channels + channel;
          if (!segments.empty() && segments.back().offset + segments.back().length == offset)
            segments.back().length += length;
          else
            segments.push_back({offset, column, length});
          column += length;
        }
        for (std::int64_t sample = first; sample < first + count; ++sample)
          kernels().gather(images.image(sample), images.positions(), segments.data(),
                           static_cast<int>(segments.size()), width,
                           out + (sample - first) * product.steps * width);
      });
}

void fisher_embedding(const Embedding& e, int threads) {
  const FisherKernels& k = kernels();
  constexpr int kWidth = 256;
  const Activity& g = e.gradients;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic, 16) if (threads > 1)
  for (std::int64_t row = 0; row < e.rows; ++row)
    for (std::int64_t first = 0; first < e.width; first += kWidth) {
      const auto n = static_cast<int>(std::min<std::int64_t>(kWidth, e.width - first));
      float squares[kWidth] = {}, sums[kWidth] = {}, one[kWidth], token[kWidth];
      for (std::int64_t s = e.row_begin[row]; s < e.row_begin[row + 1]; ++s) {
        std::fill_n(one, n, 0.0f);
        for (std::int64_t t = e.segment_begin[s]; t < e.segment_begin[s + 1]; ++t) {
          const std::int64_t sample = e.token[t] / e.steps, step = e.token[t] % e.steps;
          k.pack({at(g.data, g.dtype,
                     sample * g.sample_stride + step * g.step_stride + first * g.channel_stride),
                  g.dtype, 0, g.channel_stride},
                 1, n, n, token);
          for (int i = 0; i < n; ++i) one[i] += token[i];
        }
        for (int i = 0; i < n; ++i) squares[i] += one[i] * one[i];
        for (int i = 0; i < n; ++i) sums[i] += one[i];
      }
      const std::int64_t place = e.row_index[row] * e.width + first;
      for (int i = 0; i < n; ++i) e.total[place + i] += squares[i];
      if (e.weight_gradient != nullptr)
        for (int i = 0; i < n; ++i) e.weight_gradient[place + i] += sums[i];
    }
}

void fisher_affine(const Scaled& layer, int threads) {
  const FisherKernels& k = kernels();
  const std::int64_t channels = layer.channels, parts = divided_up(channels, kAffineChannels);
  // A block of samples at a time, so that the sums stay small whatever the batch.
  constexpr std::int64_t kBlockSums = 1 << 18;
  const std::int64_t block =
      std::clamp<std::int64_t>(kBlockSums / std::max<std::int64_t>(1, channels), 1,
                               std::max<std::int64_t>(1, layer.samples));
  std::vector<float> products(block * channels), sums(block * channels);
  for (std::int64_t first = 0; first < layer.samples; first += block) {
    const std::int64_t count = std::min(block, layer.samples - first);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
    for (std::int64_t task = 0; task < count * parts; ++task) {
      const std::int64_t own = task / parts, sample = first + own;
      const std::int64_t channel = task % parts * kAffineChannels;
      const auto matrix = [&](const Activity& a) {
        if (a.data == nullptr) return Matrix{nullptr, a.dtype, 0, 0};
        return Matrix{at(a.data, a.dtype, sample * a.sample_stride + channel * a.channel_stride),
                      a.dtype, a.step_stride, a.channel_stride};
      };
      const auto statistic = [&](const float* data, const std::int64_t* stride) {
        const float* own_data =
            data == nullptr ? nullptr : data + sample * stride[0] + channel * stride[2];
        return Statistic{own_data, stride[0], data == nullptr ? 0 : stride[1], stride[2]};
      };
      k.affine({matrix(layer.activations), matrix(layer.gradients),
                statistic(layer.mean, layer.mean_stride),
                statistic(layer.inverse_deviation, layer.inverse_deviation_stride), layer.steps,
                static_cast<int>(std::min<std::int64_t>(kAffineChannels, channels - channel)),
                products.data() + own * channels + channel,
                sums.data() + own * channels + channel});
    }
    const auto add = [&](const std::vector<float>& one, float* total, float* gradient) {
      for (std::int64_t sample = 0; sample < count; ++sample)
        for (std::int64_t c = 0; c < channels; ++c) {
          const float value = one[sample * channels + c];
          if (total != nullptr) total[c] += value * value;
          if (gradient != nullptr) gradient[c] += value;
        }
    };
    if (layer.activations.data != nullptr) add(products, layer.total, layer.weight_gradient);
    add(sums, layer.bias_total, layer.bias_gradient);
  }
}

} // namespace bdu::cpu
