#pragma once

#include <pybind11/pybind11.h>

namespace bdu::cuda {

void bind(pybind11::module_& m);

} // namespace bdu::cuda
