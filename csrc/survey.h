// What a list of torch tensors looks like from outside: where each lies and how it is laid out.
// Read through DLPack's C exchange API (dlpack.h of DLPack 1.2), which needs no torch headers and
// costs about 50 ns a tensor, where asking from Python costs half a microsecond.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace bdu {

namespace dlpack {

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* export_managed;
  void* import_managed;
  int (*borrow)(void* py_object, Tensor* out); // 0, or -1 with a Python error set
  void* current_stream;
};

} // namespace dlpack

class Survey {
 public:
  // `api` is torch.Tensor.__dlpack_c_exchange_api__.
  Survey(pybind11::list tensors, const pybind11::capsule& api);

  // Whether every tensor lies where it lay, with the same shape, strides, dtype and device.
  bool is_current() const;

  // Whether each of `others` has the dtype, device and shape of the surveyed tensor beside it, and
  // its elements in the same order in memory; then writes their addresses.
  bool fit(const pybind11::list& others, pybind11::array_t<std::int64_t> address) const;

 private:
  struct Fact {
    std::int64_t address;
    std::int32_t device_type, device_id, ndim;
    std::uint32_t dtype;
    std::size_t dims; // its shape, then its strides, in dims_
  };

  bool read(PyObject* tensor, dlpack::Tensor& out) const;
  bool is_same_kind(const Fact& fact, const dlpack::Tensor& tensor) const;

  pybind11::list tensors_;
  decltype(dlpack::ExchangeApi::borrow) borrow_;
  std::vector<Fact> facts_;
  std::vector<std::int64_t> dims_;
};

// Whether the values of the dictionaries among the values of `states`, one after the other, are the
// very objects in `known`.
bool same_entries(const pybind11::dict& states, const pybind11::list& known);

} // namespace bdu
