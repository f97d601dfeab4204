// Python's view of the CUDA kernels; bdu/cuda.py is the only caller and has checked everything.
#include "bindings.h"

#include <stdexcept>

#include "../scalars.h"
#include "launch.h"

namespace py = pybind11;

namespace bdu::cuda {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What every launch is told: addresses of device memory as integers, 0 where there is none.
Launch make_launch(std::uintptr_t cells, std::int64_t tensors, std::int64_t tiles, int stored,
                   std::uintptr_t partials, std::uintptr_t result, std::uintptr_t ticket,
                   int device, std::uintptr_t stream) {
  return {Table(pointer<const std::int64_t>(cells), tensors),
          tiles,
          static_cast<Stored>(stored),
          pointer<void>(partials),
          pointer<float>(result),
          pointer<unsigned>(ticket),
          device,
          stream};
}

void run_sgd(const Launch& launch, const SgdStep& step) {
  if (launch.device < 0) return on_host::ewc_sgd_step(launch, step);
#if defined(BDU_WITH_CUDA)
  ewc_sgd_step(launch, step);
#else
  throw std::runtime_error("bdu was built without CUDA");
#endif
}

void run_adamw(const Launch& launch, const AdamwStep& step) {
  if (launch.device < 0) return on_host::ewc_adamw_step(launch, step);
#if defined(BDU_WITH_CUDA)
  ewc_adamw_step(launch, step);
#else
  throw std::runtime_error("bdu was built without CUDA");
#endif
}

void run_norm(const Launch& launch, int column) {
  if (launch.device < 0) return on_host::grad_norm(launch, column);
#if defined(BDU_WITH_CUDA)
  grad_norm(launch, column);
#else
  throw std::runtime_error("bdu was built without CUDA");
#endif
}

} // namespace

void bind(py::module_& m) {
  m.attr("CUDA_TILE") = kTile;
  py::class_<Launch>(m, "CudaLaunch")
      .def(py::init(&make_launch), py::kw_only(), py::arg("cells"), py::arg("tensors"),
           py::arg("tiles"), py::arg("stored"), py::arg("partials"), py::arg("result"),
           py::arg("ticket"), py::arg("device"), py::arg("stream"));
  py::class_<OnDevice>(m, "CudaOnDevice")
      .def(py::init([](std::uintptr_t clip, std::uintptr_t grad_scale, std::uintptr_t found_inf,
                       std::uintptr_t lr, std::uintptr_t ewc_lambda, std::uintptr_t rounding_step) {
             return OnDevice{
                 pointer<const float>(clip),       pointer<const float>(grad_scale),
                 pointer<const float>(found_inf),  pointer<const float>(lr),
                 pointer<const float>(ewc_lambda), pointer<const std::int64_t>(rounding_step)};
           }),
           py::kw_only(), py::arg("clip"), py::arg("grad_scale"), py::arg("found_inf"),
           py::arg("lr"), py::arg("ewc_lambda"), py::arg("rounding_step"));
  m.def(
      "cuda_ewc_sgd_step",
      [](const Launch& launch, const OnDevice& on_device, double lr, double momentum,
         double dampening, bool nesterov, double weight_decay, double sign, double clip,
         double grad_scale, double ewc_lambda, int pull, double fisher_decay, bool update_fisher,
         const Rounding& rounding) {
        SgdStep step{};
        step.scalars.pull = pull_scalars(lr, weight_decay, sign, clip, grad_scale, ewc_lambda,
                                         fisher_decay, rounding);
        step.scalars.momentum = static_cast<float>(momentum);
        step.scalars.one_minus_dampening = static_cast<float>(1.0 - dampening);
        step.on_device = on_device;
        step.pull = static_cast<Pull>(pull);
        step.has_momentum = momentum != 0.0;
        step.flags = {nesterov, update_fisher};
        run_sgd(launch, step);
      },
      py::arg("launch"), py::arg("on_device"), py::kw_only(), py::arg("lr"), py::arg("momentum"),
      py::arg("dampening"), py::arg("nesterov"), py::arg("weight_decay"), py::arg("sign"),
      py::arg("clip"), py::arg("grad_scale"), py::arg("ewc_lambda"), py::arg("pull"),
      py::arg("fisher_decay"), py::arg("update_fisher"), py::arg("rounding"));
  m.def(
      "cuda_ewc_adamw_step",
      [](const Launch& launch, const OnDevice& on_device, std::uintptr_t steps, double lr,
         double beta1, double beta2, double log_beta1, double log_beta2, double epsilon,
         double weight_decay, double sign, double clip, double grad_scale, double ewc_lambda,
         int pull, double fisher_decay, bool update_fisher, const Rounding& rounding) {
        AdamwStep step{};
        step.scalars.pull = pull_scalars(lr, weight_decay, sign, clip, grad_scale, ewc_lambda,
                                         fisher_decay, rounding);
        step.scalars.beta1 = static_cast<float>(beta1);
        step.scalars.one_minus_beta1 = static_cast<float>(1.0 - beta1);
        step.scalars.beta2 = static_cast<float>(beta2);
        step.scalars.one_minus_beta2 = static_cast<float>(1.0 - beta2);
        step.scalars.epsilon = static_cast<float>(epsilon);
        step.logs = {static_cast<float>(log_beta1), static_cast<float>(log_beta2)};
        step.steps = pointer<const float>(steps);
        step.on_device = on_device;
        step.pull = static_cast<Pull>(pull);
        step.flags = {false, update_fisher};
        run_adamw(launch, step);
      },
      py::arg("launch"), py::arg("on_device"), py::arg("steps"), py::kw_only(), py::arg("lr"),
      py::arg("beta1"), py::arg("beta2"), py::arg("log_beta1"), py::arg("log_beta2"),
      py::arg("epsilon"), py::arg("weight_decay"), py::arg("sign"), py::arg("clip"),
      py::arg("grad_scale"), py::arg("ewc_lambda"), py::arg("pull"), py::arg("fisher_decay"),
      py::arg("update_fisher"), py::arg("rounding"));
  m.def("cuda_grad_norm", &run_norm, py::arg("launch"), py::arg("column"));
}

} // namespace bdu::cuda
