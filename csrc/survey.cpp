#include "survey.h"

#include <algorithm>
#include <stdexcept>

namespace bdu {
namespace {

std::int64_t address_of(const dlpack::Tensor& t) {
  return reinterpret_cast<std::int64_t>(t.data) + static_cast<std::int64_t>(t.byte_offset);
}

std::uint32_t dtype_of(const dlpack::Tensor& t) {
  return std::uint32_t{t.code} | std::uint32_t{t.bits} << 8 | std::uint32_t{t.lanes} << 16;
}

} // namespace

Survey::Survey(pybind11::list tensors, const pybind11::capsule& api)
    : tensors_(std::move(tensors)) {
  const auto* table = api.get_pointer<dlpack::ExchangeApi>();
  if (table->major != 1 || table->borrow == nullptr)
    throw std::runtime_error("api: expected DLPack 1 with dltensor_from_py_object_no_sync, got " +
                             std::to_string(table->major) + "." + std::to_string(table->minor));
  borrow_ = table->borrow;
  facts_.reserve(tensors_.size());
  for (const pybind11::handle tensor : tensors_) {
    dlpack::Tensor t;
    if (borrow_(tensor.ptr(), &t) != 0) throw pybind11::error_already_set();
    facts_.push_back(
        {address_of(t), t.device_type, t.device_id, t.ndim, dtype_of(t), dims_.size()});
    dims_.insert(dims_.end(), t.shape, t.shape + t.ndim);
    dims_.insert(dims_.end(), t.strides, t.strides + t.ndim);
  }
}

// A tensor that cannot be read (sparse, a wrapper) is not what was surveyed.
bool Survey::read(PyObject* tensor, dlpack::Tensor& out) const {
  if (borrow_(tensor, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

bool Survey::is_same_kind(const Fact& fact, const dlpack::Tensor& t) const {
  const std::int64_t* shape = dims_.data() + fact.dims;
  return dtype_of(t) == fact.dtype && t.device_type == fact.device_type &&
         t.device_id == fact.device_id && t.ndim == fact.ndim &&
         std::equal(shape, shape + fact.ndim, t.shape);
}

bool Survey::is_current() const {
  for (std::size_t i = 0; i < facts_.size(); ++i) {
    const Fact& fact = facts_[i];
    const std::int64_t* strides = dims_.data() + fact.dims + fact.ndim;
    dlpack::Tensor t;
    if (!read(PyList_GET_ITEM(tensors_.ptr(), static_cast<Py_ssize_t>(i)), t) ||
        address_of(t) != fact.address || !is_same_kind(fact, t) ||
        !std::equal(strides, strides + fact.ndim, t.strides))
      return false;
  }
  return true;
}

bool Survey::fit(const pybind11::list& others, pybind11::array_t<std::int64_t> address) const {
  if (others.size() != facts_.size() || address.ndim() != 1 ||
      static_cast<std::size_t>(address.shape(0)) != facts_.size())
    throw std::invalid_argument("others, address: expected " + std::to_string(facts_.size()) +
                                " entries");
  std::int64_t* out = address.mutable_data();
  for (std::size_t i = 0; i < facts_.size(); ++i) {
    const Fact& fact = facts_[i];
    dlpack::Tensor t;
    if (!read(PyList_GET_ITEM(others.ptr(), static_cast<Py_ssize_t>(i)), t) ||
        !is_same_kind(fact, t))
      return false;
    const std::int64_t* strides = dims_.data() + fact.dims + fact.ndim;
    // The stride of a dimension of size 1 means nothing.
    for (int d = 0; d < fact.ndim; ++d)
      if (t.shape[d] != 1 && t.strides[d] != strides[d]) return false;
    out[i] = address_of(t);
  }
  return true;
}

bool same_entries(const pybind11::dict& states, const pybind11::list& known) {
  const auto count = static_cast<Py_ssize_t>(known.size());
  Py_ssize_t at = 0, outer = 0;
  PyObject *key, *state, *value;
  while (PyDict_Next(states.ptr(), &outer, &key, &state)) {
    if (!PyDict_Check(state))
      continue; // torch keeps what a loaded dictionary holds for no parameter
    Py_ssize_t inner = 0;
    while (PyDict_Next(state, &inner, &key, &value))
      if (at >= count || PyList_GET_ITEM(known.ptr(), at++) != value) return false;
  }
  return at == count;
}

} // namespace bdu
