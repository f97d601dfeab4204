// Reads and writes of global memory by address. Addresses come out of a table, so the compiler
// cannot know what kind of memory they are of and would use the slower instructions for any kind.
#pragma once

#include <cstdint>
#include <cstring>

#include "../update_rule.h"

namespace bdu::cuda {

struct alignas(16) Pack { // 16 bytes in one instruction
  std::uint32_t word[4];
};

template <class T>
BDU_HD T load(std::int64_t address) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 16) {
    T value;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]),
                   "=r"(value.word[3])
                 : "l"(address));
    return value;
  } else if constexpr (sizeof(T) == 8) {
    std::uint64_t value;
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(value) : "l"(address));
    return value;
  } else {
    std::uint32_t value;
    if constexpr (sizeof(T) == 4)
      asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(address));
    else if constexpr (sizeof(T) == 2)
      asm volatile("ld.global.u16 %0, [%1];" : "=r"(value) : "l"(address));
    else
      asm volatile("ld.global.u8 %0, [%1];" : "=r"(value) : "l"(address));
    return static_cast<T>(value);
  }
#else
  T value;
  std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof value);
  return value;
#endif
}

template <class T>
BDU_HD void store(std::int64_t address, const T& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 16)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.word[0]),
                 "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3]));
  else if constexpr (sizeof(T) == 4)
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(value));
  else
    asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(value));
#else
  std::memcpy(reinterpret_cast<void*>(address), &value, sizeof value);
#endif
}

} // namespace bdu::cuda
