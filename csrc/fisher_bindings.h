#pragma once

#include <pybind11/pybind11.h>

namespace bdu {

void bind_fisher(pybind11::module_& m);

} // namespace bdu
