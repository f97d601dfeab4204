// Python's view of the native kernels. bdu/native.py is the only caller and has checked shapes,
// layouts and lifetimes; here only the arrays themselves are checked.
#include "cuda/bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/parallel.h"
#include "fisher_bindings.h"
#include "scalars.h"
#include "survey.h"
#if defined(BDU_WITH_CUDA)
#include "cuda/device_info.h"
#endif

namespace py = pybind11;

namespace {

using Addresses = py::array_t<std::int64_t, py::array::c_style>;
using Dtypes = py::array_t<std::uint8_t, py::array::c_style>;
using Counts = py::array_t<std::int64_t, py::array::c_style>;
using Steps = py::array_t<float, py::array::c_style>;

// Row `row` of the (columns, tensors) arrays.
bdu::Column column(const Addresses& addresses, const Dtypes& dtypes, int row) {
  return {addresses.data(row, 0), dtypes.data(row, 0)};
}

std::int64_t tensors_of(const Addresses& addresses, const Dtypes& dtypes, const Counts& numel,
                        py::ssize_t columns) {
  const py::ssize_t n = numel.shape(0);
  if (addresses.ndim() != 2 || dtypes.ndim() != 2 || addresses.shape(0) != columns ||
      dtypes.shape(0) != columns || addresses.shape(1) != n || dtypes.shape(1) != n)
    throw std::invalid_argument("addresses, dtypes: expected shape (" + std::to_string(columns) +
                                ", " + std::to_string(n) + ")");
  return n;
}

double ewc_sgd_step(const Addresses& addresses, const Dtypes& dtypes, const Counts& numel,
                    double lr, double momentum, double dampening, bool nesterov,
                    double weight_decay, double sign, double clip, double grad_scale,
                    double ewc_lambda, int pull, double fisher_decay, bool update_fisher,
                    const bdu::Rounding& rounding, int threads) {
  bdu::SgdTable table;
  table.tensors = tensors_of(addresses, dtypes, numel, 7);
  if (table.tensors == 0) return 0.0;
  table.numel = numel.data();
  table.param = column(addresses, dtypes, 0);
  table.grad = column(addresses, dtypes, 1);
  table.momentum_buffer = column(addresses, dtypes, 2);
  table.fisher = column(addresses, dtypes, 3);
  table.anchor = column(addresses, dtypes, 4);
  table.fisher_scale = column(addresses, dtypes, 5);
  table.first_element = addresses.data(6, 0);
  bdu::SgdScalars scalars;
  scalars.pull = bdu::pull_scalars(lr, weight_decay, sign, clip, grad_scale, ewc_lambda,
                                   fisher_decay, rounding);
  scalars.momentum = static_cast<float>(momentum);
  scalars.one_minus_dampening = static_cast<float>(1.0 - dampening);
  const bdu::Switches switches{static_cast<bdu::Pull>(pull), momentum != 0.0, nesterov,
                               update_fisher};
  py::gil_scoped_release release;
  return 0.5 * ewc_lambda * bdu::cpu::ewc_sgd_step(table, scalars, switches, threads);
}

double ewc_adamw_step(const Addresses& addresses, const Dtypes& dtypes, const Counts& numel,
                      const Steps& step, double lr, double beta1, double beta2, double epsilon,
                      double weight_decay, double sign, double clip, double grad_scale,
                      double ewc_lambda, int pull, double fisher_decay, bool update_fisher,
                      const bdu::Rounding& rounding, int threads) {
  bdu::AdamwTable table;
  table.tensors = tensors_of(addresses, dtypes, numel, 8);
  if (table.tensors == 0) return 0.0;
  if (step.ndim() != 1 || step.shape(0) != table.tensors)
    throw std::invalid_argument("step: expected shape (" + std::to_string(table.tensors) + ",)");
  table.numel = numel.data();
  table.param = column(addresses, dtypes, 0);
  table.grad = column(addresses, dtypes, 1);
  table.exp_avg = column(addresses, dtypes, 2);
  table.exp_avg_sq = column(addresses, dtypes, 3);
  table.fisher = column(addresses, dtypes, 4);
  table.anchor = column(addresses, dtypes, 5);
  table.fisher_scale = column(addresses, dtypes, 6);
  table.first_element = addresses.data(7, 0);
  table.step = step.data();
  bdu::AdamwScalars scalars{};
  scalars.pull = bdu::pull_scalars(lr, weight_decay, sign, clip, grad_scale, ewc_lambda,
                                   fisher_decay, rounding);
  scalars.beta1 = static_cast<float>(beta1);
  scalars.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  scalars.beta2 = static_cast<float>(beta2);
  scalars.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  scalars.epsilon = static_cast<float>(epsilon);
  const bdu::AdamwSettings settings{lr, beta1, beta2, epsilon};
  const bdu::Switches switches{static_cast<bdu::Pull>(pull), true, false, update_fisher};
  py::gil_scoped_release release;
  return 0.5 * ewc_lambda * bdu::cpu::ewc_adamw_step(table, scalars, settings, switches, threads);
}

double grad_norm(const Addresses& addresses, const Dtypes& dtypes, const Counts& numel,
                 int threads) {
  const std::int64_t tensors = tensors_of(addresses, dtypes, numel, 1);
  if (tensors == 0) return 0.0;
  const bdu::Column grad = column(addresses, dtypes, 0);
  py::gil_scoped_release release;
  return bdu::cpu::grad_norm(tensors, numel.data(), grad, threads);
}

void memory_stream(const Addresses& read, const Addresses& written, std::int64_t words,
                   int threads) {
  const auto count = static_cast<int>(written.size());
  if (read.size() != 3 || count < 2 || count > 3)
    throw std::invalid_argument("read, written: expected 3 and 2 or 3 streams");
  py::gil_scoped_release release;
  bdu::cpu::memory_stream(read.data(), written.data(), count, words, threads);
}

py::object cuda_build() {
#if defined(BDU_WITH_CUDA)
  py::list devices;
  for (const auto& device : bdu::cuda::devices())
    devices.append(py::dict(py::arg("name") = device.name, py::arg("major") = device.major,
                            py::arg("minor") = device.minor,
                            py::arg("memory_bytes") = device.memory_bytes));
  return py::dict(py::arg("runtime") = bdu::cuda::runtime_version(), py::arg("devices") = devices);
#else
  return py::none();
#endif
}

} // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of bdu; see bdu/native.py.";
  m.def("instruction_set", &bdu::cpu::instruction_set);
  m.def("cuda_build", &cuda_build, "None, or the CUDA runtime and devices this build sees.");
  py::class_<bdu::Rounding>(m, "Rounding")
      .def(py::init([](bool is_stochastic, std::int64_t seed, std::int64_t step) {
             return bdu::Rounding{is_stochastic, seed, step};
           }),
           py::arg("is_stochastic"), py::arg("seed"), py::arg("step"))
      .def_readonly("is_stochastic", &bdu::Rounding::is_stochastic);
  m.def("ewc_sgd_step", &ewc_sgd_step, py::arg("addresses"), py::arg("dtypes"), py::arg("numel"),
        py::kw_only(), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
        py::arg("nesterov"), py::arg("weight_decay"), py::arg("sign"), py::arg("clip"),
        py::arg("grad_scale"), py::arg("ewc_lambda"), py::arg("pull"), py::arg("fisher_decay"),
        py::arg("update_fisher"), py::arg("rounding"), py::arg("threads"));
  m.def("ewc_adamw_step", &ewc_adamw_step, py::arg("addresses"), py::arg("dtypes"),
        py::arg("numel"), py::arg("step"), py::kw_only(), py::arg("lr"), py::arg("beta1"),
        py::arg("beta2"), py::arg("epsilon"), py::arg("weight_decay"), py::arg("sign"),
        py::arg("clip"), py::arg("grad_scale"), py::arg("ewc_lambda"), py::arg("pull"),
        py::arg("fisher_decay"), py::arg("update_fisher"), py::arg("rounding"), py::arg("threads"));
  m.def("grad_norm", &grad_norm, py::arg("addresses"), py::arg("dtypes"), py::arg("numel"),
        py::kw_only(), py::arg("threads"));
  py::class_<bdu::Survey>(m, "Survey")
      .def(py::init<py::list, const py::capsule&>(), py::arg("tensors"), py::arg("api"))
      .def("is_current", &bdu::Survey::is_current)
      .def("fit", &bdu::Survey::fit, py::arg("others"), py::arg("address").noconvert());
  m.def("same_entries", &bdu::same_entries, py::arg("states"), py::arg("known"));
  bdu::bind_fisher(m);
  bdu::cuda::bind(m);
  m.def("memory_stream", &memory_stream, py::arg("read"), py::arg("written"), py::kw_only(),
        py::arg("words"), py::arg("threads"));
}
