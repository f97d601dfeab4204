#pragma once

#include <string>
#include <vector>

namespace bdu::cuda {

struct DeviceInfo {
  std::string name;
  int major, minor;
  long long memory_bytes;
};

int runtime_version();             // as CUDART_VERSION, e.g. 13000
std::vector<DeviceInfo> devices(); // empty without a driver or without a device

} // namespace bdu::cuda
