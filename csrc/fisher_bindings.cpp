// Python's view of the Fisher of layers. bdu/native.py is the only caller and has checked shapes,
// layouts and lifetimes.
#include "fisher_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/fisher.h"

namespace py = pybind11;

namespace bdu {
namespace {

using Address = std::int64_t;
using Numbers = std::vector<std::int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void copy_numbers(const char* name, const Numbers& from, std::int64_t* to, std::size_t count) {
  if (from.size() != count)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(count) +
                                " numbers, got " + std::to_string(from.size()));
  std::copy(from.begin(), from.end(), to);
}

void fisher_linear(const cpu::Activity& activations, const cpu::Activity& gradients,
                   std::int64_t samples, std::int64_t steps, std::int64_t inputs,
                   std::int64_t outputs, const cpu::Totals& totals, Address kept,
                   Address kept_index, int threads) {
  const cpu::Linear layer{samples,
                          steps,
                          inputs,
                          outputs,
                          activations,
                          gradients,
                          {pointer<float>(kept), pointer<std::int32_t>(kept_index)},
                          totals};
  py::gil_scoped_release release;
  cpu::fisher_linear(layer, threads);
}

void fisher_conv(Address activations, int activations_dtype, const Numbers& activations_stride,
                 const cpu::Activity& gradients, std::int64_t samples, std::int64_t inputs,
                 std::int64_t outputs, std::int64_t groups, const Numbers& size,
                 const Numbers& out_size, const Numbers& kernel_size, const Numbers& stride,
                 const Numbers& padding, const Numbers& dilation, const cpu::Totals& totals,
                 const Numbers& total_stride, int threads) {
  cpu::Convolution layer{};
  std::int64_t in[2], out[2], kernel[2];
  copy_numbers("size", size, in, 2);
  copy_numbers("out_size", out_size, out, 2);
  copy_numbers("kernel_size", kernel_size, kernel, 2);
  copy_numbers("stride", stride, layer.stride, 2);
  copy_numbers("padding", padding, layer.padding, 2);
  copy_numbers("dilation", dilation, layer.dilation, 2);
  copy_numbers("activations_stride", activations_stride, layer.activations_stride, 4);
  copy_numbers("total_stride", total_stride, layer.total_stride, 4);
  layer.samples = samples, layer.inputs = inputs, layer.outputs = outputs, layer.groups = groups;
  layer.height = in[0], layer.width = in[1];
  layer.out_height = out[0], layer.out_width = out[1];
  layer.kernel_height = kernel[0], layer.kernel_width = kernel[1];
  layer.activations = pointer<void>(activations);
  layer.activations_dtype = static_cast<Dtype>(activations_dtype);
  layer.gradients = gradients;
  layer.totals = totals;
  py::gil_scoped_release release;
  cpu::fisher_conv(layer, threads);
}

void fisher_embedding(const cpu::Activity& gradients, std::int64_t rows, std::int64_t width,
                      std::int64_t steps, Address token, Address segment_begin, Address row_begin,
                      Address row_index, Address total, Address weight_gradient, int threads) {
  const cpu::Embedding layer{rows,
                             width,
                             steps,
                             pointer<std::int64_t>(token),
                             pointer<std::int64_t>(segment_begin),
                             pointer<std::int64_t>(row_begin),
                             pointer<std::int64_t>(row_index),
                             gradients,
                             pointer<float>(total),
                             pointer<float>(weight_gradient)};
  py::gil_scoped_release release;
  cpu::fisher_embedding(layer, threads);
}

void fisher_affine(const cpu::Activity& activations, const cpu::Activity& gradients,
                   std::int64_t samples, std::int64_t steps, std::int64_t channels, Address mean,
                   const Numbers& mean_stride, Address inverse_deviation,
                   const Numbers& inverse_deviation_stride, const cpu::Totals& totals,
                   int threads) {
  cpu::Scaled layer{};
  layer.samples = samples, layer.steps = steps, layer.channels = channels;
  layer.activations = activations, layer.gradients = gradients;
  layer.mean = pointer<float>(mean);
  layer.inverse_deviation = pointer<float>(inverse_deviation);
  copy_numbers("mean_stride", mean_stride, layer.mean_stride, 3);
  copy_numbers("inverse_deviation_stride", inverse_deviation_stride, layer.inverse_deviation_stride,
               3);
  layer.totals = totals;
  py::gil_scoped_release release;
  cpu::fisher_affine(layer, threads);
}

} // namespace

void bind_fisher(py::module_& m) {
  py::class_<cpu::Activity>(m, "Activity")
      .def(py::init([](Address data, int dtype, std::int64_t sample_stride,
                       std::int64_t step_stride, std::int64_t channel_stride) {
             return cpu::Activity{pointer<void>(data), static_cast<Dtype>(dtype), sample_stride,
                                  step_stride, channel_stride};
           }),
           py::arg("data"), py::arg("dtype"), py::arg("sample_stride"), py::arg("step_stride"),
           py::arg("channel_stride"));
  py::class_<cpu::Totals>(m, "FisherTotals")
      .def(py::init(
               [](Address weight, Address bias, Address weight_gradient, Address bias_gradient) {
                 return cpu::Totals{pointer<float>(weight), pointer<float>(bias),
                                    pointer<float>(weight_gradient), pointer<float>(bias_gradient)};
               }),
           py::arg("weight"), py::arg("bias"), py::arg("weight_gradient"),
           py::arg("bias_gradient"));
  m.def("fisher_linear", &fisher_linear, py::arg("activations"), py::arg("gradients"),
        py::kw_only(), py::arg("samples"), py::arg("steps"), py::arg("inputs"), py::arg("outputs"),
        py::arg("totals"), py::arg("kept"), py::arg("kept_index"), py::arg("threads"));
  m.def("fisher_conv", &fisher_conv, py::kw_only(), py::arg("activations"),
        py::arg("activations_dtype"), py::arg("activations_stride"), py::arg("gradients"),
        py::arg("samples"), py::arg("inputs"), py::arg("outputs"), py::arg("groups"),
        py::arg("size"), py::arg("out_size"), py::arg("kernel_size"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("totals"), py::arg("total_stride"),
        py::arg("threads"));
  m.def("fisher_embedding", &fisher_embedding, py::arg("gradients"), py::kw_only(), py::arg("rows"),
        py::arg("width"), py::arg("steps"), py::arg("token"), py::arg("segment_begin"),
        py::arg("row_begin"), py::arg("row_index"), py::arg("total"), py::arg("weight_gradient"),
        py::arg("threads"));
  m.def("fisher_affine", &fisher_affine, py::arg("activations"), py::arg("gradients"),
        py::kw_only(), py::arg("samples"), py::arg("steps"), py::arg("channels"), py::arg("mean"),
        py::arg("mean_stride"), py::arg("inverse_deviation"), py::arg("inverse_deviation_stride"),
        py::arg("totals"), py::arg("threads"));
}

} // namespace bdu
