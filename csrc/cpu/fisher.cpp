#include "fisher.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <memory>
#include <vector>

#include "fisher_kernels.h"
#include "isa.h"

namespace bdu::cpu {
namespace {

// Steps of a block: its packed activations, 128 bytes a step, stay in the second cache while the
// tiles of all outputs pass.
constexpr std::int64_t kBlockSteps = 2048;
// Of the packed gradients, in floats: they are read once for every tile of inputs.
constexpr std::int64_t kPackedGradients = 2 << 20;
// A total of at most so many floats is added up in parts, one for some samples each, so that
// threads need not wait for each other; a larger one tile by tile, by all threads together. The
// number of parts depends on the shapes alone, and with it the order of summation.
constexpr std::int64_t kPartTotal = 1 << 18, kAllParts = 1 << 22, kMostParts = 32, kFewestParts = 4;
constexpr std::int64_t kFewestSteps = 512;    // of a part
constexpr std::int64_t kUnpackedOutputs = 64; // at most, of a convolution that is read in place

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

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
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
  Totals totals;
  std::int64_t output_stride;       // of the totals
  const std::int64_t* input_offset; // (inputs), likewise; null: the input's own number

  std::int64_t weights() const { return groups * outputs * inputs; }
};

// Works through blocks of samples, with `threads` threads. What is packed is its own, so several
// can work at a time. Of the source of the activations it wants
//   begin(first, count, threads): this block of samples is next;
//   place(group, first_input, inputs, buffer, tile): tells the tile where their activations are,
//   after packing them into the buffer if they are not where a vector of inputs lies together.
template <class Source>
class Worker {
 public:
  Worker(const Product& layer, const Source& source, int threads)
      : layer_(layer),
        source_(source),
        threads_(threads),
        panels_(divided_up(layer.inputs, kernels().lanes), kTileVectors),
        tiles_(layer.outputs, kernels().outputs),
        activations_(threads) {}

  void add(std::int64_t first, std::int64_t count) {
    first_ = first;
    count_ = count;
    source_.begin(first, count, threads_);
    // Outputs come in parts whose packed gradients are small; with groups, a part is some groups.
    const std::int64_t steps = count * layer_.steps;
    const std::int64_t groups =
        std::clamp<std::int64_t>(kPackedGradients / (layer_.outputs * steps), 1, layer_.groups);
    const std::int64_t tiles = std::clamp<std::int64_t>(
        kPackedGradients / (groups * steps * kernels().outputs), 1, tiles_.pieces());
    const Pieces group_parts(layer_.groups, groups), tile_parts(tiles_.pieces(), tiles);
    for (std::int64_t g = 0; g < group_parts.pieces(); ++g)
      for (std::int64_t t = 0; t < tile_parts.pieces(); ++t) {
        groups_ = group_parts.size(g), first_group_ = group_parts.begin(g);
        own_tiles_ = tile_parts.size(t), first_tile_ = tile_parts.begin(t);
        pack_gradients();
        add_tiles();
      }
  }

 private:
  std::int64_t output(std::int64_t group, std::int64_t tile) const {
    return (first_group_ + group) * layer_.outputs + tiles_.begin(first_tile_ + tile);
  }

  // Packed: all samples and steps of a tile together.
  float* gradients(std::int64_t group, std::int64_t tile) {
    const std::int64_t begin = tiles_.begin(first_tile_);
    const std::int64_t outputs = tiles_.begin(first_tile_ + own_tiles_) - begin;
    return gradients_.at_least(gradients_size_) +
           (group * outputs + tiles_.begin(first_tile_ + tile) - begin) * count_ * layer_.steps;
  }

  void pack_gradients() {
    const FisherKernels& k = kernels();
    const Activity& g = layer_.gradients;
    const std::int64_t outputs = tiles_.begin(first_tile_ + own_tiles_) - tiles_.begin(first_tile_);
    // the sums of the last step may read a vector past its end
    gradients_size_ = groups_ * outputs * count_ * layer_.steps + kMostLanes;
    gradients_.at_least(gradients_size_);
#pragma omp parallel for collapse(2) num_threads(threads_) schedule(dynamic, 1) if (threads_ > 1)
    for (std::int64_t group = 0; group < groups_; ++group)
      for (std::int64_t tile = 0; tile < own_tiles_; ++tile) {
        const auto width = static_cast<int>(tiles_.size(first_tile_ + tile));
        const std::int64_t channel = output(group, tile);
        float* to = gradients(group, tile);
        for (std::int64_t sample = 0; sample < count_; ++sample, to += layer_.steps * width) {
          k.pack({at(g.data, g.dtype,
                     (first_ + sample) * g.sample_stride + channel * g.channel_stride),
                  g.dtype, g.step_stride, g.channel_stride},
                 layer_.steps, width, width, to);
          if (layer_.totals.bias == nullptr) continue;
          float sums[kMostOutputs + kMostLanes];
          k.column_sums(to, layer_.steps, width, sums);
          for (int o = 0; o < width; ++o) layer_.totals.bias[channel + o] += sums[o] * sums[o];
          if (layer_.totals.bias_gradient == nullptr) continue;
          for (int o = 0; o < width; ++o) layer_.totals.bias_gradient[channel + o] += sums[o];
        }
      }
  }

  // A task is a panel of inputs and a run of tiles; there are runs only where panels are few.
  void add_tiles() {
    if (layer_.totals.weight == nullptr) return;
    const std::int64_t panels = groups_ * panels_.pieces();
    const std::int64_t wanted = threads_ > 1 ? divided_up(4 * threads_, panels) : 1;
    const Pieces runs(own_tiles_, std::max<std::int64_t>(1, own_tiles_ / wanted));
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 1) if (threads_ > 1)
    for (std::int64_t task = 0; task < panels * runs.pieces(); ++task) {
      const std::int64_t panel = task / runs.pieces() % panels_.pieces();
      const std::int64_t group = task / runs.pieces() / panels_.pieces();
      Tile tile{};
      tile.vectors = static_cast<int>(panels_.size(panel));
      tile.samples = count_;
      const int width = tile.vectors * kernels().lanes;
      const std::int64_t input = panels_.begin(panel) * kernels().lanes;
      tile.inputs = static_cast<int>(std::min<std::int64_t>(width, layer_.inputs - input));
      source_.place(first_group_ + group, input, activations_[thread_number()], tile);
      const std::int64_t run = task % runs.pieces();
      for (std::int64_t t = runs.begin(run); t < runs.begin(run) + runs.size(run); ++t) {
        tile.outputs = static_cast<int>(tiles_.size(first_tile_ + t));
        tile.gradients = gradients(group, t);
        add_tile(tile, output(group, t), input);
      }
    }
  }

  void add_tile(Tile& tile, std::int64_t output, std::int64_t input) {
    alignas(64) float squares[kMostOutputs * kTileVectors * kMostLanes] = {};
    alignas(64) float sums[kMostOutputs * kTileVectors * kMostLanes] = {};
    tile.squares = squares;
    tile.sums = layer_.totals.weight_gradient == nullptr ? nullptr : sums;
    if (layer_.kept.rows != nullptr) {
      const std::int64_t outputs = layer_.groups * layer_.outputs;
      tile.kept = layer_.kept.rows + input;
      tile.kept_index = layer_.kept.index + first_ * outputs + output;
      tile.kept_stride = layer_.inputs;
      tile.kept_index_stride = outputs;
    }
    kernels().tile(tile);
    add_to(layer_.totals.weight, squares, tile, output, input);
    if (tile.sums != nullptr) add_to(layer_.totals.weight_gradient, sums, tile, output, input);
  }

  void add_to(float* total, const float* own, const Tile& tile, std::int64_t output,
              std::int64_t input) const {
    const int width = tile.vectors * kernels().lanes;
    for (int o = 0; o < tile.outputs; ++o, own += width) {
      float* row = total + (output + o) * layer_.output_stride;
      if (layer_.input_offset == nullptr)
        for (int i = 0; i < tile.inputs; ++i) row[input + i] += own[i];
      else
        for (int i = 0; i < tile.inputs; ++i) row[layer_.input_offset[input + i]] += own[i];
    }
  }

  Product layer_;
  Source source_;
  int threads_;
  Pieces panels_, tiles_;
  Floats gradients_;
  std::int64_t gradients_size_ = 0;
  std::vector<Floats> activations_; // of a thread
  // of the block, and of the part of its outputs
  std::int64_t first_ = 0, count_ = 0;
  std::int64_t first_group_ = 0, groups_ = 0, first_tile_ = 0, own_tiles_ = 0;
};

// The totals of some blocks, to be added to the others in a fixed order.
class Part {
 public:
  explicit Part(const Product& layer)
      : weight_(layer.totals.weight == nullptr ? 0 : layer.weights()),
        weight_gradient_(layer.totals.weight_gradient == nullptr ? 0 : layer.weights()),
        bias_(layer.totals.bias == nullptr ? 0 : layer.groups * layer.outputs),
        bias_gradient_(layer.totals.bias_gradient == nullptr ? 0 : layer.groups * layer.outputs) {}

  Totals totals() {
    const auto data = [](std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
    return {data(weight_), data(bias_), data(weight_gradient_), data(bias_gradient_)};
  }

  void add_to(const Totals& totals) const {
    const auto add = [](const std::vector<float>& from, float* to) {
      for (std::size_t i = 0; i < from.size(); ++i) to[i] += from[i];
    };
    add(weight_, totals.weight);
    add(bias_, totals.bias);
    add(weight_gradient_, totals.weight_gradient);
    add(bias_gradient_, totals.bias_gradient);
  }

 private:
  std::vector<float> weight_, weight_gradient_, bias_, bias_gradient_;
};

std::int64_t count_parts(const Product& layer) {
  if (layer.weights() > kPartTotal || layer.kept.rows != nullptr) return 1;
  const std::int64_t parts =
      std::min({kMostParts, kAllParts / std::max<std::int64_t>(1, layer.weights()), layer.samples,
                layer.samples * layer.steps / kFewestSteps});
  return parts < kFewestParts ? 1 : parts;
}

template <class Source>
void add_squares(const Product& layer, const Source& source, int threads) {
  if (layer.samples == 0 || layer.steps == 0 || layer.outputs == 0) return;
  const std::int64_t most = std::max<std::int64_t>(1, kBlockSteps / layer.steps);
  const auto work = [&](const Product& own, std::int64_t first, std::int64_t count, int threads) {
    Worker<Source> worker(own, source, threads);
    const Pieces blocks(count, most);
    for (std::int64_t b = 0; b < blocks.pieces(); ++b)
      worker.add(first + blocks.begin(b), blocks.size(b));
  };
  const Pieces pieces(layer.samples, divided_up(layer.samples, count_parts(layer)));
  if (pieces.pieces() == 1) return work(layer, 0, layer.samples, threads);

  std::vector<Part> parts(pieces.pieces(), Part(layer));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (std::int64_t p = 0; p < pieces.pieces(); ++p) {
    Product own = layer;
    own.totals = parts[p].totals();
    work(own, pieces.begin(p), pieces.size(p), 1);
  }
  for (const Part& part : parts) part.add_to(layer.totals);
}

// Samples and steps one after the other, each with its inputs and nothing between.
void packed_in(const float* buffer, std::int64_t steps, Tile& tile) {
  const std::int64_t width = tile.vectors * kernels().lanes;
  tile.activations = buffer;
  tile.positions = {1, steps, 0, width};
  tile.sample_stride = steps * width;
  for (int v = 0; v < tile.vectors; ++v) tile.offset[v] = v * kernels().lanes;
}

class Rows {
 public:
  Rows(const Activity& activations, std::int64_t steps) : a_(activations), steps_(steps) {}

  void begin(std::int64_t first, std::int64_t count, int) { first_ = first, count_ = count; }

  void place(std::int64_t, std::int64_t first_input, Floats& buffer, Tile& tile) const {
    const int width = tile.vectors * kernels().lanes;
    float* out = buffer.at_least(count_ * steps_ * width);
    packed_in(out, steps_, tile);
    for (std::int64_t sample = first_; sample < first_ + count_; ++sample, out += steps_ * width)
      kernels().pack(
          {at(a_.data, a_.dtype, sample * a_.sample_stride + first_input * a_.channel_stride),
           a_.dtype, a_.step_stride, a_.channel_stride},
          steps_, tile.inputs, width, out);
  }

 private:
  Activity a_;
  std::int64_t steps_, first_ = 0, count_ = 0;
};

// Some channels of a sample's image, the channels last and the padding around.
class Image {
 public:
  Image(const Convolution& layer, std::int64_t channels)
      : layer_(&layer),
        height_(layer.height + 2 * layer.padding[0]),
        width_(layer.width + 2 * layer.padding[1]),
        channels_(channels) {}

  // A vector at the last place may be read past its end.
  std::int64_t size() const { return height_ * width_ * channels_; }

  Positions positions() const {
    return {layer_->out_height, layer_->out_width, layer_->stride[0] * width_ * channels_,
            layer_->stride[1] * channels_};
  }
  std::int64_t offset(std::int64_t tap) const {
    return (tap / layer_->kernel_width * layer_->dilation[0] * width_ +
            tap % layer_->kernel_width * layer_->dilation[1]) *
           channels_;
  }

  // Channels beyond those of the layer are zeros.
  void fill(std::int64_t sample, std::int64_t first_channel, float* out) const {
    const Convolution& c = *layer_;
    const std::int64_t above = c.padding[0], beside = c.padding[1] * channels_;
    const std::int64_t row = width_ * channels_;
    const auto channels = static_cast<int>(std::min(channels_, c.inputs - first_channel));
    std::fill_n(out, above * row, 0.0f);
    std::fill_n(out + (above + c.height) * row, above * row, 0.0f);
    for (std::int64_t y = 0; y < c.height; ++y) {
      float* to = out + (above + y) * row;
      std::fill_n(to, beside, 0.0f);
      std::fill_n(to + row - beside, beside, 0.0f);
      kernels().pack({at(c.activations, c.activations_dtype,
                         sample * c.activations_stride[0] +
                             first_channel * c.activations_stride[1] + y * c.activations_stride[2]),
                      c.activations_dtype, c.activations_stride[3], c.activations_stride[1]},
                     c.width, channels, static_cast<int>(channels_), to + beside);
    }
  }

 private:
  const Convolution* layer_;
  std::int64_t height_, width_, channels_;
};

// The inputs of a convolution's output: (tap, channel), taps first, so that neighbours in the image
// are neighbours among them.
class Windows {
 public:
  explicit Windows(const Convolution& layer) : layer_(&layer), image_(layer, layer.inputs) {}
  Windows(const Windows& other) : Windows(*other.layer_) {}

  void begin(std::int64_t first, std::int64_t count, int threads) {
    count_ = count;
    images_ = buffer_.at_least(count * image_.size());
    (void)threads; // unused where OpenMP is absent
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && count > 1)
    for (std::int64_t sample = 0; sample < count; ++sample)
      image_.fill(first + sample, 0, images_ + sample * image_.size());
  }

  void place(std::int64_t group, std::int64_t first_input, Floats& buffer, Tile& tile) const {
    const std::int64_t channels = layer_->inputs / layer_->groups;
    const int lanes = kernels().lanes;
    const Positions positions = image_.positions();
    const auto offset = [&](std::int64_t input) {
      return image_.offset(input / channels) + group * channels + input % channels;
    };
    // Few outputs would not pay for the packing; many would miss the cache with the image's
    // strides.
    if (channels % lanes == 0 && layer_->outputs / layer_->groups <= kUnpackedOutputs) {
      tile.activations = images_;
      tile.positions = positions;
      tile.sample_stride = image_.size();
      for (int v = 0; v < tile.vectors; ++v) tile.offset[v] = offset(first_input + v * lanes);
      return;
    }
    std::vector<Segment> segments;
    for (int column = 0; column < tile.inputs;) {
      const auto length = static_cast<int>(std::min<std::int64_t>(
          channels - (first_input + column) % channels, tile.inputs - column));
      const std::int64_t begin = offset(first_input + column);
      if (!segments.empty() && segments.back().offset + segments.back().length == begin)
        segments.back().length += length;
      else
        segments.push_back({begin, column, length});
      column += length;
    }
    const std::int64_t steps = positions.height * positions.width;
    const int width = tile.vectors * lanes;
    float* out = buffer.at_least(count_ * steps * width);
    packed_in(out, steps, tile);
    for (std::int64_t sample = 0; sample < count_; ++sample, out += steps * width)
      kernels().gather(images_ + sample * image_.size(), positions, segments.data(),
                       static_cast<int>(segments.size()), width, out);
  }

  // Where in the total an input of a group stands.
  std::vector<std::int64_t> offsets() const {
    const Convolution& c = *layer_;
    std::vector<std::int64_t> offsets;
    for (std::int64_t y = 0; y < c.kernel_height; ++y)
      for (std::int64_t x = 0; x < c.kernel_width; ++x)
        for (std::int64_t channel = 0; channel < c.inputs / c.groups; ++channel)
          offsets.push_back(channel * c.total_stride[1] + y * c.total_stride[2] +
                            x * c.total_stride[3]);
    return offsets;
  }

 private:
  const Convolution* layer_;
  Image image_;
  Floats buffer_;
  float* images_ = nullptr;
  std::int64_t count_ = 0;
};

// One input for each output: a vector of channels at a time, through all samples.
void fisher_depthwise(const Convolution& c, int threads) {
  const FisherKernels& k = kernels();
  const std::int64_t taps = c.kernel_height * c.kernel_width;
  const std::int64_t steps = c.out_height * c.out_width, copies = c.outputs / c.inputs;
  const Image image(c, k.lanes);
  std::vector<std::int64_t> offset(taps);
  for (std::int64_t tap = 0; tap < taps; ++tap) offset[tap] = image.offset(tap);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (std::int64_t channel = 0; channel < c.inputs; channel += k.lanes) {
    const auto lanes = static_cast<int>(std::min<std::int64_t>(k.lanes, c.inputs - channel));
    std::vector<float> pixels(image.size()), gradients(steps * k.lanes);
    std::vector<float> squares(copies * taps * k.lanes), sums(squares.size());
    for (std::int64_t sample = 0; sample < c.samples; ++sample) {
      if (c.totals.weight != nullptr) image.fill(sample, channel, pixels.data());
      for (std::int64_t copy = 0; copy < copies; ++copy) {
        const Activity& g = c.gradients;
        k.pack({at(g.data, g.dtype,
                   sample * g.sample_stride + (channel * copies + copy) * g.channel_stride),
                g.dtype, g.step_stride, copies * g.channel_stride},
               steps, lanes, k.lanes, gradients.data());
        if (c.totals.bias != nullptr) {
          float own[2 * kMostLanes];
          k.column_sums(gradients.data(), steps, k.lanes, own);
          for (int lane = 0; lane < lanes; ++lane) {
            const std::int64_t place = (channel + lane) * copies + copy;
            c.totals.bias[place] += own[lane] * own[lane];
            if (c.totals.bias_gradient != nullptr) c.totals.bias_gradient[place] += own[lane];
          }
        }
        if (c.totals.weight == nullptr) continue;
        const std::int64_t place = copy * taps * k.lanes;
        k.depthwise({pixels.data(), gradients.data(), k.lanes, offset.data(),
                     static_cast<int>(taps), squares.data() + place,
                     c.totals.weight_gradient == nullptr ? nullptr : sums.data() + place},
                    image.positions());
      }
    }
    if (c.totals.weight == nullptr) continue;
    for (std::int64_t copy = 0; copy < copies; ++copy)
      for (std::int64_t tap = 0; tap < taps; ++tap)
        for (int lane = 0; lane < lanes; ++lane) {
          const std::int64_t from = (copy * taps + tap) * k.lanes + lane;
          const std::int64_t to = ((channel + lane) * copies + copy) * c.total_stride[0] +
                                  tap / c.kernel_width * c.total_stride[2] +
                                  tap % c.kernel_width * c.total_stride[3];
          c.totals.weight[to] += squares[from];
          if (c.totals.weight_gradient != nullptr) c.totals.weight_gradient[to] += sums[from];
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
  product.totals = layer.totals;
  product.output_stride = layer.inputs;
  add_squares(product, Rows(layer.activations, layer.steps), threads);
}

void fisher_conv(const Convolution& layer, int threads) {
  if (layer.groups == layer.inputs && layer.groups > 1) return fisher_depthwise(layer, threads);
  const Windows windows(layer);
  const std::vector<std::int64_t> offsets = windows.offsets();
  Product product{};
  product.samples = layer.samples;
  product.steps = layer.out_height * layer.out_width;
  product.groups = layer.groups;
  product.inputs = layer.kernel_height * layer.kernel_width * layer.inputs / layer.groups;
  product.outputs = layer.outputs / layer.groups;
  product.gradients = layer.gradients;
  product.totals = layer.totals;
  product.output_stride = layer.total_stride[0];
  product.input_offset = offsets.data();
  add_squares(product, windows, threads);
}

void fisher_embedding(const Embedding& e, int threads) {
  const FisherKernels& k = kernels();
  constexpr int kWidth = 256;
  const Activity& g = e.gradients;
  const std::int64_t parts = divided_up(e.width, kWidth);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16) if (threads > 1)
  for (std::int64_t task = 0; task < e.rows * parts; ++task) {
    const std::int64_t row = task / parts, first = task % parts * kWidth;
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
  const std::int64_t channels = layer.channels;
  if (layer.samples == 0 || channels == 0) return;
  // A block of samples at a time, so that the sums stay small whatever the batch.
  constexpr std::int64_t kBlockSums = 1 << 18;
  const std::int64_t block = std::clamp<std::int64_t>(kBlockSums / channels, 1, layer.samples);
  std::vector<float> products(block * channels), sums(block * channels);
  for (std::int64_t first = 0; first < layer.samples; first += block) {
    const std::int64_t count = std::min(block, layer.samples - first);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count > 1)
    for (std::int64_t own = 0; own < count; ++own) {
      const std::int64_t sample = first + own;
      for (std::int64_t channel = 0; channel < channels; channel += kAffineChannels) {
        const auto matrix = [&](const Activity& a) {
          if (a.data == nullptr) return Matrix{nullptr, a.dtype, 0, 0};
          return Matrix{at(a.data, a.dtype, sample * a.sample_stride + channel * a.channel_stride),
                        a.dtype, a.step_stride, a.channel_stride};
        };
        const auto statistic = [&](const float* data, const std::int64_t* stride) {
          if (data == nullptr) return Statistic{nullptr, 0, 0};
          return Statistic{data + sample * stride[0] + channel * stride[2], stride[1], stride[2]};
        };
        k.affine({matrix(layer.activations), matrix(layer.gradients),
                  statistic(layer.mean, layer.mean_stride),
                  statistic(layer.inverse_deviation, layer.inverse_deviation_stride), layer.steps,
                  static_cast<int>(std::min<std::int64_t>(kAffineChannels, channels - channel)),
                  products.data() + own * channels + channel,
                  sums.data() + own * channels + channel});
      }
    }
    const auto add = [&](const std::vector<float>& one, float* total, float* gradient) {
      for (std::int64_t sample = 0; sample < count; ++sample) {
        const float* own = one.data() + sample * channels;
        if (total != nullptr)
          for (std::int64_t c = 0; c < channels; ++c) total[c] += own[c] * own[c];
        if (gradient != nullptr)
          for (std::int64_t c = 0; c < channels; ++c) gradient[c] += own[c];
      }
    };
    if (layer.activations.data != nullptr)
      add(products, layer.totals.weight, layer.totals.weight_gradient);
    add(sums, layer.totals.bias, layer.totals.bias_gradient);
  }
}

} // namespace bdu::cpu
