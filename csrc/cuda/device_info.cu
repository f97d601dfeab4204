#include <cuda_runtime.h>

#include "device_info.h"

namespace bdu::cuda {

int runtime_version() { return CUDART_VERSION; }

std::vector<DeviceInfo> devices() {
  int count = 0;
  // A machine without a driver answers with an error; for a list of devices that is "none".
  if (cudaGetDeviceCount(&count) != cudaSuccess) return {};
  std::vector<DeviceInfo> found;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    found.push_back({properties.name, properties.major, properties.minor,
                     static_cast<long long>(properties.totalGlobalMem)});
  }
  return found;
}

} // namespace bdu::cuda
